"""Which image, and which of its copies, every slot of every batch takes: repeated augmentation.

Pure arithmetic on (seed, epoch, position). An epoch permutes the images, repeats every index
`repeats` times in a row (three as published, one to switch it off) and deals these positions
round-robin to the groups of the global batch: the published code deals to its devices, and a group
of `group_size` images takes the device's place, so nothing depends on how many devices there are.
`recipe.md` of the specification calls this "Sampling"; source: `RASampler` of DeiT, as published.

A global batch is laid out group by group: slot g * group_size + j is sample j of group g.
"""

import dataclasses
import functools

import numpy as np

from stvit_jax.errors import UserError

ROUNDED_TO = 256
"""With repeats, an epoch has the data set's size in positions, rounded down to a multiple of it."""


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of training images.

    Attributes:
      num_images: size N of the data set.
      batch_size: images in a global batch, over all devices and hosts.
      group_size: images that share batch-norm statistics; 0 makes the whole batch one group.
      repeats: copies of an image in an epoch's list; 1 visits every image once.
      seed: non-negative.

    Raises:
      UserError: there is nothing in it, or groups do not divide the batch.
    """

    num_images: int
    batch_size: int
    group_size: int = 0
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.group_size and self.batch_size % self.group_size:
            raise UserError(
                f"group_size {self.group_size} does not divide batch_size {self.batch_size}: "
                "change one of them"
            )
        if not self.num_images:
            raise UserError("there are no images to train on: add some")

    @property
    def _kept(self) -> int:
        if self.repeats == 1 or self.num_images < ROUNDED_TO:
            return self.num_images
        return self.num_images // ROUNDED_TO * ROUNDED_TO

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in an epoch; positions of a last partial batch are dropped.

        Of a set that is smaller than a batch, one, which takes images again.
        """
        return max(1, self._kept // self.batch_size)

    @property
    def positions_per_epoch(self) -> int:
        """Positions that an epoch's batches take."""
        return self.steps_per_epoch * self.batch_size

    def positions(self, step: int, slots: np.ndarray) -> np.ndarray:
        """Positions in the epoch (int64, shape of `slots`) of `slots` of its batch `step`."""
        group_size = self.group_size or self.batch_size
        groups = self.batch_size // group_size
        group, sample = np.divmod(np.asarray(slots, np.int64), group_size)
        return (step * group_size + sample) * groups + group

    def images(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index of the image, copy from 0 on) at `positions` of `epoch`, both int64."""
        index, copy = np.divmod(np.asarray(positions, np.int64), self.repeats)
        again, index = np.divmod(index, self.num_images)
        return permutation(self.num_images, self.seed, epoch)[index], again * self.repeats + copy


@functools.lru_cache(maxsize=2)  # a loader is in one epoch, or on the edge of two
def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0 .. size - 1 (int64, read-only) that (seed, epoch) determine for good.

    The ranks of Philox's raw output, ties by index: NumPy guarantees that stream across versions,
    which it does not for `Generator.permutation`.
    """
    keys = np.random.Philox(counter=0, key=[seed, epoch]).random_raw(size)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order


def image_rng(seed: int, epoch: int, index: int, copy: int) -> np.random.Generator:
    """The generator of every host-side random choice for one copy of one image in one epoch.

    Philox streams of different (seed, epoch, index, copy) do not overlap, nor with `permutation`.
    """
    # The counter's words count from the lowest; 2**64 draws before the next stream is reached.
    return np.random.Generator(np.random.Philox(counter=[0, index, copy, 1], key=[seed, epoch]))
