"""What a person sees while a program runs: lines, progress, durations.

A console is unimportant: a closed pipe, a full disk under it or an encoding that lacks a character
never ends what the lines are about. Of several processes the first one speaks for all; the others
speak of trouble only, with their number.
"""

import os
import sys
import time
from typing import TextIO

number: int | None = None  # of this process among several, see `cluster`


def say(message: str, *, everyone: bool = False) -> None:
    """One line on standard output, of the first process or, where that matters, of every one."""
    if everyone or not number:
        _write(sys.stdout, message)


def warn(message: str, *, everyone: bool = True) -> None:
    """One line on standard error, for what went wrong and did not end the program.

    Of every process, with its number, unless all of them know it.
    """
    if everyone or not number:
        _write(sys.stderr, f"process {number}: {message}" if number else message)


def _write(stream: TextIO | None, message: str) -> None:
    if stream is None:  # started without a console (pythonw, some daemons)
        return
    try:
        encoding = stream.encoding or "utf-8"
        print(message.encode(encoding, "backslashreplace").decode(encoding), file=stream)
        stream.flush()
    except (OSError, ValueError):  # nobody reads any more, or there is no room; closed
        _silence(stream)


def _silence(stream: TextIO) -> None:
    """Sends the rest to nowhere: what is still in the buffer would fail again, at exit for good."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # no file under it (a notebook, a test), or closed already
        pass


class Progress:
    """Says how far a long piece of work is, every ten seconds, with the time it still takes."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, total
        self._start = self._said = time.monotonic()

    def update(self, done: int) -> None:
        """`done` of the total."""
        now = time.monotonic()
        if done and now - self._said >= 10:
            self._said = now
            left = (now - self._start) / done * (self._total - done)
            say(f"{self._what}: {done}/{self._total}, {duration(left)} left")


def duration(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
