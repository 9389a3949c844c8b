"""The share of batches that one process loads, which does not end where its data fail.

The next step of other processes waits for this one, in a collective. So it takes part with zeros,
marked as a fault: nobody learns from them, and the mark is how all get to know, at the same step.
Where there are no others, a fault is raised as it is.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from stvit_jax import cluster
from stvit_jax.data.examples import Batch, Spec, zeros
from stvit_jax.data.loader import Batches
from stvit_jax.errors import UserError, described


def share_spec(spec: Spec) -> Spec:
    """What every example of a share has: that of a batch and, among others, the mark."""
    return spec | ({"fault": ((), np.bool_)} if cluster.joined() else {})


class Share(Iterator[Batch]):
    """`fault` is what ended the data, if anything did."""

    def __init__(self, batches: Batches, specs: Iterable[Spec], size: int) -> None:
        """Of `size` examples a batch, as many batches as `specs`, with a fault or without."""
        self._batches, self._specs, self._size = batches, iter(specs), size
        self.fault: UserError | None = None
        self.close, self.waits_for = batches.close, batches.waits_for

    def __next__(self) -> Batch:
        if not cluster.joined():
            return next(self._batches)
        spec = share_spec(next(self._specs))
        mark = np.zeros(self._size, np.bool_)
        if self.fault is None:
            try:
                return next(self._batches) | {"fault": mark}
            except StopIteration:
                raise
            except Exception as fault:  # whatever it is, the others must not wait
                self.fault = fault if isinstance(fault, UserError) else UserError(described(fault))
        return zeros(spec, self._size) | {"fault": ~mark}

    def agree(self) -> None:
        """Raises UserError, in all processes, where one has met a fault; all have to ask."""
        cluster.agree_on(self.fault)
