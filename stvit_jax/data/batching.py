"""Which examples every batch of an evaluation holds, and of what shapes.

Every example is in one batch. Where all have one shape, they follow each other. Pictures that keep
their own sizes are in groups of one: a batch is of one group, and the largest come first, so that
what does not fit is met at once.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from stvit_jax.data.examples import BOOKKEEPING, Examples, Group, Spec
from stvit_jax.errors import UserError

NONE = -1  # in place of an example's number, where a batch is padded


@dataclasses.dataclass(frozen=True)
class Batching:
    """The batches of an evaluation.

    Attributes:
      batch_size: of every global batch.
      indices: (batches, batch_size) int64: numbers of examples, or NONE.
      specs: of every batch, what an example has of the loader.
    """

    batch_size: int
    indices: np.ndarray
    specs: tuple[Spec, ...]

    @classmethod
    def of(cls, examples: Examples, batch_size: int) -> "Batching":
        """That of a set.

        Raises:
          UserError: there is nothing in it.
        """
        groups = examples.groups or (Group(np.arange(len(examples.source)), examples.spec),)
        parts = [_padded(group.indices, batch_size) for group in groups]
        specs = [group.spec | BOOKKEEPING for group in groups]
        indices = np.concatenate(parts)
        if not len(indices):
            raise UserError(f"there are no images in {examples.source.name}: add some")
        return cls(batch_size, indices, tuple(_repeated(specs, map(len, parts))))

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def counts(self) -> list[int]:
        """Examples in every batch."""
        return np.sum(self.indices != NONE, axis=1).tolist()


def _padded(indices: np.ndarray, batch_size: int) -> np.ndarray:
    batches = -(-len(indices) // batch_size)
    padded = np.full(batches * batch_size, NONE, np.int64)
    padded[: len(indices)] = indices
    return padded.reshape(batches, batch_size)


def _repeated(specs: Iterable[Spec], times: Iterable[int]) -> Iterable[Spec]:
    for spec, count in zip(specs, times, strict=True):
        yield from [spec] * count
