"""Batches on the devices ahead of their use."""

import contextlib
import gc
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from stvit_jax import parallel
from stvit_jax.data.loader import Batches
from stvit_jax.data.processes import PATIENCE
from stvit_jax.data.share import Share
from stvit_jax.errors import Interrupted

POLL = 0.1  # seconds


def device_prefetch(
    batches: Batches | Share,
    sharding: Any,
    *,
    interrupted: Callable[[], bool] = lambda: False,
    size: int = 2,
) -> "DevicePrefetch":
    """Puts batches on the devices ahead of their use, from a thread that starts at once.

    Args:
      batches: of this process's share; closed with the result.
      sharding: of the leading axis of every array.
      interrupted: asked while there is no batch to give, so that data that hang can be left.
      size: how many batches wait on the devices.

    Returns:
      an iterator of the batches as global `jax.Array`s, in order. Exceptions of `batches` arrive
      where their batch would have been. It wants `close()`, which takes seconds at most.

    Raises, when iterated:
      Interrupted: there was no batch, and `interrupted` said so.
    """
    return DevicePrefetch(batches, sharding, interrupted, size)


class DevicePrefetch(Iterator[dict[str, Any]]):
    """See `device_prefetch`."""

    def __init__(
        self, batches: Batches | Share, sharding: Any, interrupted: Callable[[], bool], size: int
    ) -> None:
        self._interrupted = interrupted
        self.waits_for = batches.waits_for
        self._queue: queue.Queue = queue.Queue(size)
        stop = threading.Event()
        # The thread holds no reference to self: an iterator that is dropped is closed.
        thread = threading.Thread(
            target=_put_ahead, args=(batches, sharding, self._queue, stop), daemon=True
        )
        thread.start()
        self.close = weakref.finalize(self, _stop_ahead, batches, stop, thread)

    def __next__(self) -> dict[str, Any]:
        while self.close.alive:
            try:
                batch, error = self._queue.get(timeout=POLL)
            except queue.Empty:
                if self._interrupted():
                    raise Interrupted from None
                continue
            if error is not None:
                self.close()
                raise error
            return batch
        raise StopIteration


def _put_ahead(
    batches: Batches | Share, sharding: Any, out: queue.Queue, stop: threading.Event
) -> None:
    error: BaseException | None = None
    while error is None and not stop.is_set():
        item = None
        try:
            item = {k: parallel.from_slots(rows, sharding) for k, rows in next(batches).items()}
        except BaseException as raised:  # StopIteration too: it ends the iteration over there
            if not stop.is_set():  # then nobody asks any more
                error = raised
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                out.put((item, error), timeout=POLL)
                break


def _stop_ahead(batches: Batches | Share, stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():  # the garbage collector runs in any thread
        batches.close()
        thread.join(PATIENCE)
        gc.collect()  # what `batches.close` collects, once more: the thread may have held it
