"""Loading a part of a batch by its number: what a worker does.

A part is up to PART examples of one batch. With whole batches as elements, every worker would hold
several of them in shared memory, and the first would be long in coming.
"""

import abc
import dataclasses
from typing import Any

import numpy as np

from stvit_jax.console import warn
from stvit_jax.data.batching import NONE, Batching
from stvit_jax.data.decode import UnreadableImage
from stvit_jax.data.examples import Batch, Examples, Spec, batch_spec, zeros
from stvit_jax.data.order import Order, image_rng
from stvit_jax.errors import UserError, one_line

PART = 32
MAX_UNREADABLE = 300  # positions in a row
MAX_NAMED = 20  # unreadable examples that a process names


@dataclasses.dataclass(frozen=True)
class Part(abc.ABC):
    """Loads a part by its number: those of a batch follow each other, and so do the batches.

    Attributes:
      examples: what is loaded.
      slots: the slots of the global batch that are loaded.
    """

    examples: Examples
    slots: np.ndarray

    @property
    def per_batch(self) -> int:
        """Parts of a batch."""
        return -(-len(self.slots) // PART)

    def spec(self, batch: int) -> Spec:
        """What every example of a batch has."""
        return batch_spec(self.examples)

    def __call__(self, number: int) -> Batch:
        batch, part = divmod(int(number), self.per_batch)
        slots = self.slots[part * PART : (part + 1) * PART]
        rows = zeros(self.spec(batch), len(slots))
        self.fill(rows, batch, slots)
        return rows

    @abc.abstractmethod
    def fill(self, rows: Batch, batch: int, slots: np.ndarray) -> None:
        """Loads `slots` of a batch into `rows`, which are zeros."""


@dataclasses.dataclass(frozen=True)
class TrainPart(Part):
    """Of endless batches in an order, augmented; unreadable examples are replaced."""

    order: Order

    def fill(self, rows: Batch, batch: int, slots: np.ndarray) -> None:
        epoch, step = divmod(batch, self.order.steps_per_epoch)
        rows["mask"][:] = True
        for row, position in enumerate(self.order.positions(step, slots)):
            example, rows["unreadable"][row] = self._read(epoch, int(position))
            for key, value in example.items():
                rows[key][row] = value

    def _read(self, epoch: int, position: int) -> tuple[dict[str, Any], int]:
        """An example, and how many unreadable positions precede it."""
        order, (source, load) = self.order, (self.examples.source, self.examples.load)
        for skipped in range(MAX_UNREADABLE):
            following = (position + skipped) % order.positions_per_epoch
            index, copy = (int(x) for x in order.images(epoch, following))
            try:
                return load(source[index], image_rng(order.seed, epoch, index, copy)), skipped
            except UnreadableImage as error:
                reason = str(error)
                _name_unreadable(source.where(index), reason)
        raise UserError(
            f"{MAX_UNREADABLE} images in a row do not decode (the last: "
            f"{one_line(source.where(index), 1000)}: {reason}): check the data set"
        )


@dataclasses.dataclass(frozen=True)
class EvalPart(Part):
    """Of batches that hold every example once; unreadable ones are marked."""

    batching: Batching

    def spec(self, batch: int) -> Spec:
        return self.batching.specs[batch]

    def fill(self, rows: Batch, batch: int, slots: np.ndarray) -> None:
        source = self.examples.source
        indices = self.batching.indices[batch, slots]
        rows["mask"][:] = indices != NONE
        for row in np.flatnonzero(rows["mask"]):
            index = int(indices[row])
            try:
                example = self.examples.load(source[index], None)
            except UnreadableImage as error:
                rows["unreadable"][row] = 1
                _name_unreadable(source.where(index), str(error))
                example = error.known
            for key, value in example.items():
                rows[key][row] = value


_named_unreadable: set[str] = set()  # by this process


def _name_unreadable(where: str, reason: str) -> None:
    """Says which image does not decode, so that it can be mended: each once, and not too many."""
    if where not in _named_unreadable and len(_named_unreadable) < MAX_NAMED:
        _named_unreadable.add(where)
        warn(f"{one_line(where, 1000)} does not decode: {reason}")
