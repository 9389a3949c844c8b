"""Notices that a run has come to a standstill, says at what, and ends it: nothing waits for ever.

The thread that trains says what it turns to, batch after batch. Where it turns to nothing for long,
another thread tells what it waits for, with the stacks of all threads. Data that do not come can be
left: the run saves and ends in order. Whatever else hangs (a device, another process, a file
system) cannot be called back, and the program ends where it is; the last checkpoint is as it was.
"""

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Callable

from stvit_jax import cluster
from stvit_jax.console import duration, warn
from stvit_jax.training import signals

SLOWER = 5  # times the slowest turn so far is no standstill
GRACE = 30.0  # seconds to save and to end in order


class Watchdog:
    """Watches the thread that makes it, from `start` on, until it is closed."""

    def __init__(self, patience: float) -> None:
        """`patience`: seconds without a sign of life; 0: none of this."""
        self._patience = patience
        self._what: str | Callable[[], str] = ""
        self._turned = time.monotonic()
        self._slowest = 0.0
        self._stalled = threading.Event()
        self._closed = threading.Event()

    @property
    def stalled(self) -> bool:
        """Whether to leave the data that are waited for, save and end; others would not know."""
        return self._stalled.is_set() and not cluster.joined()

    def start(self) -> None:
        """What comes before, compilation for example, may last as long as it wants.

        Nor does it count as a turn: after a compilation of an hour patience would be five.
        """
        self._turned, self._slowest = time.monotonic(), 0.0
        if self._patience:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Nothing is watched any more."""
        self._closed.set()

    def at(self, what: str | Callable[[], str]) -> None:
        """The sign of life: what is waited for next, in words, or what says it when asked."""
        now = time.monotonic()
        self._slowest = max(self._slowest, now - self._turned)
        self._turned, self._what = now, what

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._patience / 10)):
            waited = time.monotonic() - self._turned
            if waited > max(self._patience, SLOWER * self._slowest):
                self._act(waited)
                return

    def _act(self, waited: float) -> None:
        what = self._what if isinstance(self._what, str) else self._what()
        warn(f"nothing has happened for {duration(waited)}: waiting for {what}; where all are:")
        with contextlib.suppress(Exception):  # a console that is no file
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        turned = self._turned
        self._stalled.set()
        # The data can be left, and then there is something to do that takes its time.
        grace = min(GRACE, self._patience)
        while not self._closed.wait(grace):
            if self._turned == turned:
                signals.end(1, f"error: still waiting for {what}: the last step is lost")
            turned, grace = self._turned, self._patience
