"""What a task learns from or is measured on: a source, how one example is loaded, what that gives.

`Examples.spec` is the only place that says what a batch holds: the loader allocates by it, and the
step compiles by it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from stvit_jax.data.sources import Source

Load = Callable[[dict[str, Any], np.random.Generator | None], dict[str, np.ndarray]]
Spec = dict[str, tuple[tuple[int, ...], DTypeLike]]  # by feature: shape and type of one example
Batch = dict[str, np.ndarray]

BOOKKEEPING: Spec = {"mask": ((), np.bool_), "unreadable": ((), np.int32)}
"""What the loader adds to every example.

- `mask`: False on the padding of an evaluation's last batch.
- `unreadable`: in training, how many positions in a row did not decode before the one that is in
  the slot; in evaluation, 1 where the example itself does not decode (of its arrays those that are
  not known are zeros then).
"""


@dataclasses.dataclass(frozen=True)
class Group:
    """Examples of one shape in a set of several.

    Attributes:
      indices: their numbers, integers.
      spec: shape and type of every array that `load` gives of them.
    """

    indices: np.ndarray
    spec: Spec


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples of a task.

    Attributes:
      source: undecoded features, by number.
      load: (features, generator of every random choice; None: as for evaluation) to the arrays of
        `spec`. It runs on the host, in worker processes, too: it pickles, and imports no JAX. It
        raises `decode.UnreadableImage` where an image does not decode.
      spec: shape and type of every array that `load` gives.
      groups: of a set to evaluate on whose shapes differ, in place of `spec`, the largest first.
    """

    source: Source
    load: Load
    spec: Spec = dataclasses.field(default_factory=dict)
    groups: tuple[Group, ...] = ()


def batch_spec(examples: Examples) -> Spec:
    """What every example of a batch of the loader has: that of the task, and BOOKKEEPING."""
    return examples.spec | BOOKKEEPING


def zeros(spec: Spec, count: int) -> Batch:
    """A batch of `count` examples, all zeros."""
    return {key: np.zeros((count, *shape), dtype) for key, (shape, dtype) in spec.items()}
