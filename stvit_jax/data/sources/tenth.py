"""A part to evaluate on, of a set that has none."""

import dataclasses
from typing import Any

from stvit_jax.data.sources import Source

TENTH = 10


@dataclasses.dataclass(frozen=True)
class Tenth(Source):
    """Every tenth example of a source, the first one included, or all the others.

    Attributes:
      source: of all examples.
      held_out: every tenth, to evaluate on; else the others, to train on.
    """

    source: Source
    held_out: bool

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    def __len__(self) -> int:
        held_out = -(-len(self.source) // TENTH)
        return held_out if self.held_out else len(self.source) - held_out

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self._number(index)]

    def where(self, index: int) -> str:
        return self.source.where(self._number(index))

    def _number(self, index: int) -> int:
        """The example's number in the source."""
        return TENTH * index if self.held_out else index + index // (TENTH - 1) + 1
