"""Several programs that do the same work, timed in turns in one run.

A machine is never quite calm. Contenders that take turns meet the same weather, and the median of
many rounds leaves out the storms; seconds of CPU time are kept beside those of the clock, because
other programs on the machine hardly change them.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from stvit_jax.console import Progress

TURN = 0.2  # seconds that a turn takes at least, so that waiting for its end hardly counts

# Does the work so many times, and returns when all of it is done.
Work = Callable[[int], None]


class Seconds(NamedTuple):
    """Medians over the rounds, for doing the work once."""

    wall: float
    cpu: float  # of all threads of the process


@dataclasses.dataclass(frozen=True)
class Contender:
    """A program that is ready to be timed.

    Attributes:
      work: runs it.
      compile_seconds: before it could run; None: whatever compiles does so in the first step.
      first_seconds: of the first step.
      peak_memory: bytes of the device at its worst so far; None: the device does not tell.
      program: the compiled program's text; None: there is none.
    """

    work: Work
    compile_seconds: float | None
    first_seconds: float
    peak_memory: int | None
    program: Callable[[], str] | None = None


def cores() -> int:
    """How many this process may use: the threads of XLA's pool, and what PyTorch is to take."""
    return len(os.sched_getaffinity(0))


def seconds(work: Callable[[], object]) -> float:
    """Of the clock, for something that is done once."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(contenders: Mapping[str, Work], rounds: int, what: str) -> dict[str, Seconds]:
    """Times all contenders in turns; another one begins every round.

    Args:
      contenders: by name; compiled and warm.
      rounds: turns of each.
      what: is timed, for the progress that is said.
    """
    times = {
        name: max(1, round(TURN / seconds(lambda work=work: work(1))))
        for name, work in contenders.items()
    }
    found: dict[str, list[Seconds]] = {name: [] for name in contenders}
    names, progress = list(contenders), Progress(what, rounds)
    for number in range(rounds):
        for i in range(len(names)):
            name = names[(number + i) % len(names)]
            cpu = time.process_time()
            wall = seconds(lambda name=name: contenders[name](times[name]))
            cpu = time.process_time() - cpu
            found[name].append(Seconds(wall / times[name], cpu / times[name]))
        progress.update(number + 1)
    return {
        name: Seconds(*map(statistics.median, zip(*values, strict=True)))
        for name, values in found.items()
    }
