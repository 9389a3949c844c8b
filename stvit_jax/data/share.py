"""The share of batches that one process loads, which does not end where its data fail.

The next step of other processes waits for this one, in a collective. So it takes part with zeros,
marked as a fault: nobody learns from them, and the mark is how all get to know, at the same step.
Where there are no others, a fault is raised as it is.
"""

from collections.abc import Iterator

import numpy as np

from stvit_jax import cluster
from stvit_jax.data.examples import Batch, Examples, Spec, batch_spec, zeros
from stvit_jax.data.loader import Batches
from stvit_jax.errors import UserError, described


def share_spec(examples: Examples) -> Spec:
    """What every example of a share has: that of a batch and, among others, the mark."""
    return batch_spec(examples) | ({"fault": ((), np.bool_)} if cluster.joined() else {})


class Share(Iterator[Batch]):
    """`fault` is what ended the data, if anything did."""

    def __init__(
        self, batches: Batches, examples: Examples, size: int, count: int | None = None
    ) -> None:
        """Of `size` examples a batch; `count` batches (None: endless), with a fault or without."""
        self._batches, self._left = batches, count
        self._empty = zeros(share_spec(examples), size)
        self.fault: UserError | None = None
        self.close, self.waits_for = batches.close, batches.waits_for

    def __next__(self) -> Batch:
        if not cluster.joined():
            return next(self._batches)
        if self._left is not None:
            if not self._left:
                raise StopIteration
            self._left -= 1
        mark = self._empty["fault"]
        if self.fault is None:
            try:
                return next(self._batches) | {"fault": mark}
            except StopIteration:
                raise
            except Exception as fault:  # whatever it is, the others must not wait
                self.fault = fault if isinstance(fault, UserError) else UserError(described(fault))
        return self._empty | {"fault": ~mark}

    def agree(self) -> None:
        """Raises UserError, in all processes, where one has met a fault; all have to ask."""
        cluster.agree_on(self.fault)
