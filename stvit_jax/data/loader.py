"""Batches of examples: Grain over random access, in this process or in workers.

The position is one integer, batches consumed: a loader is built from it, and Grain's own state,
which is tied to the number of workers, is never saved. Every example is a function of (seed, epoch,
index, copy), so any number of workers and any split of a batch over processes give the same data.
"""

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from stvit_jax.data import processes
from stvit_jax.data.batching import Batching
from stvit_jax.data.examples import Batch, Examples
from stvit_jax.data.order import Order
from stvit_jax.data.parts import EvalPart, Part, TrainPart
from stvit_jax.errors import UserError

IN_PROCESS_EXAMPLES = 2_000
ENDLESS = 2**40


def train_batches(
    examples: Examples,
    order: Order,
    *,
    start: int = 0,
    slots: slice | np.ndarray = slice(None),
    workers: int = 0,
) -> "Batches":
    """Endless training batches, from batch number `start` on.

    Args:
      examples: what is loaded.
      order: which example every slot of every batch takes.
      start: batches consumed before.
      slots: the slots of the global batch that this process loads, b of them.
      workers: processes that load; 0 loads in this one.

    Returns:
      an iterator of batches of b examples, as `batch_spec(examples)` says. It wants `close()`.

    Raises, when iterated:
      UserError: a damaged file, hundreds of unreadable images in a row, or a worker was killed.
    """
    part = TrainPart(examples, np.arange(order.batch_size)[slots], order)
    return Batches(part, start, ENDLESS, workers)


def eval_batches(
    examples: Examples,
    *,
    batch_size: int,
    slots: slice | np.ndarray = slice(None),
    workers: int = 0,
) -> "Batches":
    """Every example once, as `Batching` has it; the last batch, or that of a group, is padded.

    Args:
      examples: what is loaded.
      batch_size: of the global batch.
      slots: the slots of the global batch that this process loads, b of them.
      workers: processes that load. Small sets are loaded in this one all the same, because a worker
        takes seconds to start.

    Returns:
      an iterator of batches of b examples, as `batch_spec(examples)` says. It wants `close()`.

    Raises, when iterated:
      UserError: a damaged file, or a worker was killed.
    """
    batching = Batching.of(examples, batch_size)
    part = EvalPart(examples, np.arange(batch_size)[slots], batching)
    few = len(examples.source) <= IN_PROCESS_EXAMPLES
    return Batches(part, 0, len(batching), 0 if few else workers)


class Batches(Iterator[Batch]):
    """Batches put together from the parts that Grain loads. `close()` may come from any thread."""

    def __init__(self, part: Part, start: int, stop: int, workers: int) -> None:
        _give_grain_its_flags()
        numbers = grain.MapDataset.range(start * part.per_batch, stop * part.per_batch)
        threads = 0 if workers else 2
        parts = numbers.map(part).to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        )
        if workers:
            parts = parts.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers),
                worker_init_fn=processes.end_with_parent,
            )
        self._parts = [iter(parts)]  # emptied by `close`: what Grain leaves fails at Python's end
        self._size = len(part.slots)
        self._workers, self._next, self._started = workers, 0, False
        self._closing, self._lock = threading.Event(), threading.Lock()
        self.close = weakref.finalize(self, _close, self._closing, self._lock, self._parts)

    def waits_for(self) -> str:
        """In words, what the next part of a batch comes from."""
        if not self._workers:
            return "the data"
        return f"the data of loader worker {self._next % self._workers} of {self._workers}"

    def __next__(self) -> Batch:
        batch: Batch = {}
        filled = 0
        with self._lock:
            while filled < self._size:
                filled += self._add_part(batch, filled)
        return batch

    def _add_part(self, batch: Batch, filled: int) -> int:
        """Copies the next part to where it belongs; how many examples it has.

        A worker's part is in shared memory: the frame of an exception, which may live on, must not
        hold one.
        """
        part = self._next_part()
        self._next += 1
        count = len(part["mask"])
        for key, rows in part.items():
            if key not in batch:
                batch[key] = np.empty((self._size, *rows.shape[1:]), rows.dtype)
            batch[key][filled : filled + count] = rows
        return count

    def _next_part(self) -> Batch:
        if self._closing.is_set():
            raise StopIteration
        if self._started:
            return self._guarded_next()
        self._started = True
        with processes.signals_blocked():
            return self._guarded_next()

    def _guarded_next(self) -> Batch:
        try:
            return next(*self._parts)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            if self._closing.is_set():
                raise StopIteration from None
            raise UserError(
                "a loader worker was killed, by -9 usually for lack of memory, by -7 for lack of "
                f"shared memory (/dev/shm): lower data.workers ({error})"
            ) from error


def _give_grain_its_flags() -> None:
    """Lets Grain read its absl flags where nobody parses flags: pytest, notebooks, scripts.

    The other flags, which are the user's, stay unparsed.
    """
    if not flags.FLAGS.is_parsed():
        for name in flags.FLAGS:
            if name.startswith("grain_"):
                flags.FLAGS[name].present = True


def _close(closing: threading.Event, lock: threading.Lock, holder: list[Any]) -> None:
    """Ends threads and workers; those that hang, after PATIENCE."""
    closing.set()
    (parts,) = holder
    processes.resume(parts)
    # A __next__ in another thread leaves after the part that it waits for, or with its worker.
    # Where it hangs without workers, nothing can end it.
    if lock.acquire(timeout=processes.PATIENCE) or (
        processes.kill(parts) and lock.acquire(timeout=processes.PATIENCE)
    ):
        processes.close(parts)
        lock.release()
    parts.close()
    holder.clear()
    if hasattr(parts, "_iterators_in_use"):
        # An ended worker's last part stays in a cycle of an exception and frames, and with it
        # shared memory, of which Python would warn at the end of the program.
        gc.collect()
