"""Batches of examples: Grain over random access, in this process or in workers.

The position is one integer, batches consumed: a loader is built from it, and Grain's own state,
which is tied to the number of workers, is never saved. Every example is a function of (seed, epoch,
index, copy), so any number of workers and any split of a batch over processes give the same data.
"""

import contextlib
import gc
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

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
    """Every example once, in order; the last batch is padded.

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
    part = EvalPart(examples, np.arange(batch_size)[slots], batch_size)
    size = len(examples.source)
    return Batches(part, 0, -(-size // batch_size), 0 if size <= IN_PROCESS_EXAMPLES else workers)


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
                grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_init_worker
            )
        self._parts = iter(parts)
        self._size = len(part.slots)
        self._started = False
        self._closing, self._lock = threading.Event(), threading.Lock()
        self.close = weakref.finalize(self, _close, self._closing, self._lock, self._parts)

    def __next__(self) -> Batch:
        batch: Batch = {}
        filled = 0
        with self._lock:
            while filled < self._size:
                part = self._next_part()
                count = len(part["mask"])
                for key, rows in part.items():
                    if key not in batch:
                        batch[key] = np.empty((self._size, *rows.shape[1:]), rows.dtype)
                    # Copied even if it is the whole batch: a worker's part is in shared memory.
                    batch[key][filled : filled + count] = rows
                filled += count
        return batch

    def _next_part(self) -> Batch:
        if self._closing.is_set():
            raise StopIteration
        if self._started:
            return self._guarded_next()
        self._started = True
        with _signals_blocked():
            return self._guarded_next()

    def _guarded_next(self) -> Batch:
        try:
            return next(self._parts)
        except UserError as error:
            error.__traceback__ = None  # its frames hold the last part, in shared memory
            raise
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
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


def _close(closing: threading.Event, lock: threading.Lock, parts: Any) -> None:
    closing.set()
    with lock:  # a __next__ in another thread leaves after the part that it waits for
        # Grain ends its workers one after another, a second each, and has no public way to end
        # them together; without this attribute it is only slower.
        workers = getattr(parts, "_iterators_in_use", ())  # None in place of one that has ended
        closers = [threading.Thread(target=worker.close) for worker in workers if worker]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join()
        parts.close()
    if workers:
        # An ended worker's last part stays in a cycle of an exception and frames, and with it
        # shared memory, of which Python would warn at the end of the program.
        gc.collect()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Keeps SIGINT and SIGTERM from processes started inside, from their first instruction on.

    A terminal's Ctrl-C and a scheduler's SIGTERM go to every process of a job, and the training
    process, which must finish its step, needs its workers. A blocked signal stays blocked in
    threads and processes that are started under it, Grain's starter threads included.
    """
    # Starting the tracker of shared memory would unblock the signals again.
    multiprocessing.resource_tracker.ensure_running()
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _init_worker(index: int, count: int) -> None:
    """Makes a worker end with its parent, however that ends."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
