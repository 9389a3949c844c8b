"""Batches from a source: Grain over random access, in worker processes, prefetched to devices.

The position is one integer, batches consumed: a loader is built from it, and Grain's own state,
which is tied to the number of workers, is never saved. Every image is a function of (seed, epoch,
index, copy), so any number of workers and any split of a batch over processes give the same data.

Grain's element is a *part*: up to `PART` images of one batch. With whole batches as elements every
worker would hold several of them in shared memory, and the first would be long in coming.
"""

import contextlib
import dataclasses
import gc
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import queue
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from stvit_jax.data import decode
from stvit_jax.data.order import Order, image_rng
from stvit_jax.data.sources import Source
from stvit_jax.errors import UserError

PART = 32
MAX_UNREADABLE = 300  # positions in a row
MAX_NAMED = 20  # unreadable images that a process names
IN_PROCESS_IMAGES = 2_000
ENDLESS = 2**40

Batch = dict[str, np.ndarray]


def train_batches(
    source: Source,
    order: Order,
    *,
    image_size: int,
    flip: bool,
    start: int = 0,
    slots: slice | np.ndarray = slice(None),
    workers: int = 0,
) -> "Batches":
    """Endless training batches, from batch number `start` on.

    Args:
      source: the images.
      order: which image every slot of every batch takes.
      image_size: pixels, square.
      flip: whether half of the images are flipped.
      start: batches consumed before.
      slots: the slots of the global batch that this process loads, b of them.
      workers: processes that load; 0 loads in this one.

    Returns:
      an iterator of `image` uint8 (b, S, S, 3), `label` int32 (b,), and `replaced` int32 (b,): how
      many positions in a row were unreadable before the one in the slot. It wants `close()`.

    Raises, when iterated:
      UserError: a damaged file, hundreds of unreadable images in a row, or a worker was killed.
    """
    part = TrainPart(source, np.arange(order.batch_size)[slots], image_size, order, flip)
    return Batches(part, start, ENDLESS, workers)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    slots: slice | np.ndarray = slice(None),
    workers: int = 0,
) -> "Batches":
    """Every image once, in order; the last batch is padded.

    Args:
      source: the images.
      batch_size: of the global batch.
      image_size: pixels, square.
      slots: the slots of the global batch that this process loads, b of them.
      workers: processes that load. Small sets are loaded in this one all the same, because a worker
        takes seconds to start.

    Returns:
      an iterator of `image` uint8 (b, S, S, 3), `label` int32 (b,), `mask` bool (b,), False on
      padding, and `readable` bool (b,), False where an image (then black) does not decode. It wants
      `close()`.

    Raises, when iterated:
      UserError: a damaged file, or a worker was killed.
    """
    part = _EvalPart(source, np.arange(batch_size)[slots], image_size, batch_size)
    in_process = len(source) <= IN_PROCESS_IMAGES
    return Batches(part, 0, -(-len(source) // batch_size), 0 if in_process else workers)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Loads a part by its number: those of a batch follow each other, and so do the batches."""

    source: Source
    slots: np.ndarray
    image_size: int

    @property
    def per_batch(self) -> int:
        return -(-len(self.slots) // PART)

    def __call__(self, number: int) -> Batch:
        batch, part = divmod(int(number), self.per_batch)
        return self.load(batch, self.slots[part * PART : (part + 1) * PART])

    def load(self, batch: int, slots: np.ndarray) -> Batch:
        raise NotImplementedError

    def empty(self, count: int) -> Batch:
        return {
            "image": np.zeros((count, self.image_size, self.image_size, 3), np.uint8),
            "label": np.zeros(count, np.int32),
        }


@dataclasses.dataclass(frozen=True)
class TrainPart(_Part):
    order: Order
    flip: bool

    def load(self, batch: int, slots: np.ndarray) -> Batch:
        epoch, step = divmod(batch, self.order.steps_per_epoch)
        out = self.empty(len(slots)) | {"replaced": np.zeros(len(slots), np.int32)}
        for row, position in enumerate(self.order.positions(step, slots)):
            image, label, replaced = self._read(epoch, int(position))
            out["image"][row], out["label"][row], out["replaced"][row] = image, label, replaced
        return out

    def _read(self, epoch: int, position: int) -> tuple[np.ndarray, int, int]:
        """Image, label, and how many unreadable positions precede the readable one."""
        order = self.order
        for skipped in range(MAX_UNREADABLE):
            following = (position + skipped) % order.positions_per_epoch
            index, copy = (int(x) for x in order.images(epoch, following))
            data, label = self.source[index]
            rng = image_rng(order.seed, epoch, index, copy)
            try:
                return decode.train_image(data, self.image_size, rng, self.flip), label, skipped
            except decode.UnreadableImage as error:
                reason = str(error)
                _name_unreadable(self.source.where(index), reason)
        raise UserError(
            f"{MAX_UNREADABLE} images in a row do not decode (the last: "
            f"{self.source.where(index)}: {reason}): check the data set"
        )


@dataclasses.dataclass(frozen=True)
class _EvalPart(_Part):
    batch_size: int

    def load(self, batch: int, slots: np.ndarray) -> Batch:
        indices = batch * self.batch_size + slots
        mask = indices < len(self.source)
        out = self.empty(len(slots)) | {"mask": mask, "readable": np.ones(len(slots), bool)}
        for row in np.flatnonzero(mask):
            data, out["label"][row] = self.source[int(indices[row])]
            try:
                out["image"][row] = decode.eval_image(data, self.image_size)
            except decode.UnreadableImage as error:
                out["readable"][row] = False
                _name_unreadable(self.source.where(int(indices[row])), str(error))
        return out


_named_unreadable: set[str] = set()  # by this process


def _name_unreadable(where: str, reason: str) -> None:
    """Says which image does not decode, so that it can be mended: each once, and not too many."""
    if where not in _named_unreadable and len(_named_unreadable) < MAX_NAMED:
        _named_unreadable.add(where)
        print(f"{where} does not decode: {reason}", file=sys.stderr, flush=True)


class Batches(Iterator[Batch]):
    """Batches put together from the parts that Grain loads. `close()` may come from any thread."""

    def __init__(self, part: _Part, start: int, stop: int, workers: int) -> None:
        if not flags.FLAGS.is_parsed():
            # Grain reads absl flags; pytest, notebooks and scripts never parse any.
            flags.FLAGS.mark_as_parsed()
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
                count = len(part["label"])
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


def device_prefetch(batches: Batches, sharding: Any, size: int = 2) -> "DevicePrefetch":
    """Puts batches on the devices ahead of their use, from a thread that starts at once.

    Args:
      batches: of this process's share; closed with the result.
      sharding: of the leading axis of every array.
      size: how many batches wait on the devices.

    Returns:
      an iterator of the batches as global `jax.Array`s, in order. Exceptions of `batches` arrive
      where their batch would have been. It wants `close()`.
    """
    return DevicePrefetch(batches, sharding, size)


class DevicePrefetch(Iterator[dict[str, Any]]):
    """See `device_prefetch`."""

    def __init__(self, batches: Batches, sharding: Any, size: int) -> None:
        self._queue: queue.Queue = queue.Queue(size)
        stop = threading.Event()
        # The thread holds no reference to self: an iterator that is dropped is closed.
        thread = threading.Thread(
            target=_put_ahead, args=(batches, sharding, self._queue, stop), daemon=True
        )
        thread.start()
        self.close = weakref.finalize(self, _stop_ahead, batches, stop, thread)

    def __next__(self) -> dict[str, Any]:
        if not self.close.alive:
            raise StopIteration
        batch, error = self._queue.get()
        if error is not None:
            self.close()
            raise error
        return batch


def _put_ahead(batches: Batches, sharding: Any, out: queue.Queue, stop: threading.Event) -> None:
    import jax  # here, because loader workers import this module

    error: BaseException | None = None
    while error is None and not stop.is_set():
        item = None
        try:
            item = {
                key: jax.make_array_from_process_local_data(sharding, array)
                for key, array in next(batches).items()
            }
        except BaseException as raised:  # StopIteration too: it ends the iteration over there
            error = raised
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                out.put((item, error), timeout=0.1)
                break


def _stop_ahead(batches: Batches, stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():  # the garbage collector runs in any thread
        batches.close()
        thread.join()
