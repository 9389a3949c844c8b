"""Stopping when a signal asks for it, in one process or in all of them at the same step.

Python runs signal handlers between two of its own instructions, so a handler waits for as long as a
compilation lasts. Here the C-level handler writes the signal's number into a pipe and a thread
reads it at once: before training has begun there is nothing to lose and the thread ends the
process; later it sets a flag, and the loop saves and returns. A second signal ends at once.

Among several processes SIGTERM is left to JAX's own notifier, which tells all of them and has them
agree on a step; the other signals are turned into it. Nothing ends such a process at once, while
it compiles for example: the others would wait for it.

Imports nothing heavy: `train.py` calls `install` before it imports anything else.
"""

import contextlib
import os
import signal
import sys
import threading
from multiprocessing import active_children
from typing import NoReturn

from stvit_jax.console import warn

# What schedulers, terminals and people send: SLURM warns with SIGUSR1, LSF with SIGUSR2, a lost
# connection sends SIGHUP, a limit of CPU time SIGXCPU.
WATCHED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
STOPPED = 75  # exit code: stopped early, state saved, the same command continues (EX_TEMPFAIL)


class Stop:
    """Whether the run has been asked to stop."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._armed = threading.Event()
        self._shared = False
        self._asked, self._agreed = 0, False

    @property
    def requested(self) -> bool:
        """Whether this process may act on a request by itself: never where there are others."""
        return self._requested.is_set() and not self._shared

    def share(self) -> None:
        """From now on all processes stop together; after they have joined."""
        self._shared = True
        self.arm()

    def reached(self) -> bool:
        """Whether to stop here. All processes ask equally often, and all get the same answer."""
        if not self._shared:
            return self.requested
        if not self._agreed:
            from jax.experimental import multihost_utils

            self._asked += 1
            self._agreed = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._agreed

    def arm(self) -> None:
        """From now on there is something to save: a signal sets `requested` and nothing else."""
        self._armed.set()

    def _receive(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._requested.is_set():
            end(128 + number, f"{name} again: stopped at once, the last step was not saved")
        self._requested.set()
        if not self._armed.is_set():
            end(STOPPED, f"{name}: stopped before the first step; the same command continues")
        if self._shared:
            warn(f"{name}: all processes stop after a step that they agree on")
            os.kill(os.getpid(), signal.SIGTERM)  # for JAX's notifier
        else:
            warn(f"{name}: saving after this step (once more: stop at once)")


def install() -> Stop:
    """Takes over the signals that ask a program to stop; call in the main thread."""
    stop = Stop()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in WATCHED:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # nohup
        signal.signal(number, lambda *_: None)  # without a Python handler nothing is written

    def watch() -> None:
        while True:
            for number in os.read(reader, 1):
                if number in WATCHED:
                    stop._receive(number)

    threading.Thread(target=watch, name="signals", daemon=True).start()
    return stop


def end(code: int, message: str) -> NoReturn:
    """Ends the program at once, from any thread, and its loader processes with it."""
    for child in active_children():  # os._exit leaves loader processes behind
        child.kill()
    warn(message)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)
