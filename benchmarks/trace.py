"""An XProf trace of some steps, and the time in it by kind of operation.

    xprof --port 8791 DIR     # or TensorBoard with its profile plugin: everything that is in it

What a compiled operation is, a fusion above all, its program's text says.
"""

import collections
import re
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.profiler import ProfileData

from benchmarks.timing import Work

STEPS = 3
# What a fusion is named after, the weightiest first.
HEAVY = ("convolution", "dot", "reduce-window", "scatter", "gather", "reduce")
# Their time is that of the operations in them, which are in the trace, too.
NESTING = ("while", "conditional", "call")


def record(work: Work, directory: Path) -> Path:
    """Traces some steps; returns the trace's file."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # of no interest, and large
    with jax.profiler.trace(str(directory), profiler_options=options):
        work(STEPS)
    return max(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)


def kinds(program: str) -> dict[str, str]:
    """The kind of every operation of a compiled program, by its name.

    A fusion is named after the weightiest operation in it, a custom call after its target.
    """
    inside: dict[str, set[str]] = collections.defaultdict(set)  # opcodes, by computation
    found: dict[str, str] = {}
    called: dict[str, str] = {}
    computation = ""
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            computation = header[1]
        elif operation := re.match(r" +(?:ROOT )?%?([\w.-]+) = .*? ([a-z][\w-]*)\(", line):
            name, opcode = operation.groups()
            inside[computation].add(opcode)
            found[name] = opcode
            if opcode == "custom-call":
                target = re.search(r'custom_call_target="([^"]*)"', line)
                found[name] = f"custom-call {target[1] if target else ''}".strip()
            elif opcode == "fusion" and (calls := re.search(r"calls=%?([\w.-]+)", line)):
                called[name] = calls[1]
    for name, computation in called.items():
        heavy = next((opcode for opcode in HEAVY if opcode in inside[computation]), None)
        found[name] = f"fusion of {heavy}" if heavy else "fusion, pointwise"
    return found


def events(path: Path) -> Iterator[tuple[str, float]]:
    """(name of the operation, seconds) of everything that a device ran, in a trace."""
    planes = list(ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in devices or planes:  # on CPU the host is the device
        for line in plane.lines:
            for event in line.events:
                if name := dict(event.stats).get("hlo_op"):
                    yield name, event.duration_ns / 1e9


def by_kind(path: Path, program: str) -> list[tuple[str, int, float]]:
    """(kind, operations a step, seconds a step), the longest first."""
    known = kinds(program)
    counts: collections.Counter[str] = collections.Counter()
    seconds: collections.Counter[str] = collections.Counter()
    for name, taken in events(path):
        kind = known.get(name, "unknown")
        if kind not in NESTING:
            counts[kind] += 1
            seconds[kind] += taken
    return [(k, round(counts[k] / STEPS), s / STEPS) for k, s in seconds.most_common()]


def table(rows: list[tuple[str, int, float]]) -> list[str]:
    """In columns, with each kind's share."""
    total = sum(seconds for _, _, seconds in rows) or 1
    lines = [f"{'kind of operation':<40}{'a step':>8}{'ms':>10}{'share':>8}"]
    return lines + [
        f"{kind:<40}{count:>8}{1000 * seconds:>10.2f}{seconds / total:>8.1%}"
        for kind, count, seconds in rows
    ]
