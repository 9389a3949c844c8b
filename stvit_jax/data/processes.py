"""Grain's worker processes: how they start, and that they end.

Grain has no public way to them. Without the attributes that `iterators` and `alive` look for,
closing is slower, and waits for a worker that hangs.
"""

import concurrent.futures
import contextlib
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

PATIENCE = 3  # seconds that closing waits for what may hang, and then again for its end
STOPPING = {
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
}


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Keeps signals that stop a run from processes started inside, from their first moment on.

    A terminal's Ctrl-C or end, and a scheduler's SIGTERM or warning go to every process of a job,
    and the training process, which must finish its step, needs its workers. A blocked signal stays
    blocked in threads and processes that are started under it, Grain's starter threads included.
    """
    # Starting the tracker of shared memory would unblock the signals again.
    multiprocessing.resource_tracker.ensure_running()
    old = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def end_with_parent(index: int, count: int) -> None:
    """Grain calls it in every worker: makes it end with its parent, however that ends."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def close(parts: Any) -> None:
    """Closes all workers at once, and kills those that do not end.

    The caller holds the lock of `parts`: nobody waits for a worker.
    """
    # Grain ends its workers one after another, a second each, and waits for what hangs.
    closers = [threading.Thread(target=it.close, daemon=True) for it in iterators(parts)]
    for closer in closers:
        closer.start()
    if not _joined(closers):
        kill(parts)
        _joined(closers)


def iterators(parts: Any) -> list[Any]:
    """Grain's iterators over its workers, one each, those not yet in use included."""
    waiting = getattr(getattr(parts, "_prefetch_ds_iter", None), "_buffer", ())
    made = [future.result() for future in list(waiting) if _is_ready(future)]
    return [*filter(None, getattr(parts, "_iterators_in_use", ())), *made]


def _is_ready(future: concurrent.futures.Future) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def alive(parts: Any) -> list[multiprocessing.Process]:
    """The workers that live."""
    readers = (getattr(it, "_maybe_nonnative_parent", None) for it in iterators(parts))
    found = (getattr(reader, "_prefetch_process", None) for reader in readers)
    return [process for process in found if process and process.is_alive()]


def resume(parts: Any) -> None:
    """Continues workers that somebody stopped: they would never end."""
    for process in alive(parts):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)


def kill(parts: Any) -> bool:
    """Kills the workers; whether there were any."""
    found = alive(parts)
    for process in found:
        process.kill()
    return bool(found)


def _joined(threads: list[threading.Thread]) -> bool:
    """Waits for the threads, PATIENCE for all together."""
    end = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0, end - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)
