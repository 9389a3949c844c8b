"""A compiled program as XLA prints it: what devices say to each other, and what is done twice."""

import dataclasses
import math
import re
from collections.abc import Iterator

BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}  # the others name theirs: f32, s8, u4
TYPE = re.compile(r"\b(pred|bf16|c64|c128|[sfu]\d+)(?:e\d\w*)?\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r" = (?P<type>.*?) (?P<kind>all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|"
    r"collective-permute|collective-broadcast)(?P<start>-start)?\("
)
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?[:=]\s*\{"?n"?:"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Collective:
    """A communicating operation.

    Attributes:
      kind: XLA's name, `all-reduce`.
      dtype: of what is sent, `f32`; `bf16+f32` where one operation sends both.
      elements: that a device has of the result.
      bytes: of these, without padding.
      times: that the program does it, as often as its loops say.
    """

    kind: str
    dtype: str
    elements: int
    bytes: int
    times: int = 1


def collectives(program: str) -> list[Collective]:
    """The communicating operations of a program, in order of the text's computations as called.

    A loop that does not say how often it turns counts once.
    """
    named, entry = computations(program)
    return list(_walk(named, entry, 1))


def recomputed(program: str) -> int:
    """How many operations the compiler itself does twice, because their results found no room."""
    again = re.findall(r"^  (?:ROOT )?%?[\w.-]+\.remat[\w.-]* = .*", program, re.MULTILINE)
    return sum(" get-tuple-element(" not in line for line in again)


def computations(program: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation by its name, and the entry's name ("": a mere excerpt)."""
    named: dict[str, list[str]] = {"": []}
    entry = name = ""
    for line in program.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if header and "->" in line:
            name = header[2]
            entry = name if header[1] else entry
            named[name] = []
        elif line.startswith("  "):
            named[name].append(line)
        elif line.startswith("}"):
            name = ""
    return named, entry


def _walk(named: dict[str, list[str]], name: str, times: int) -> Iterator[Collective]:
    for line in named.get(name, ()):
        if found := _COLLECTIVE.search(line):
            yield _collective(found, times)
            continue
        called = _CALLED.findall(line)
        branches = _BRANCHES.search(line)
        called += [("branch", b.strip(" %")) for b in branches[1].split(",")] if branches else []
        for how, callee in called:
            again = turns(line, named, dict(called)) if how == "body" else 1
            yield from _walk(named, callee, times * again)


def turns(line: str, named: dict[str, list[str]], called: dict[str, str]) -> int:
    """How often a loop turns: it is said, or its condition compares with one constant."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = "\n".join(named.get(called.get("condition", ""), ()))
    bounds = re.findall(r" s32\[\]\S* constant\((\d+)\)", condition)
    return int(bounds[0]) if len(bounds) == 1 and "direction=LT" in condition else 1


def _collective(found: re.Match, times: int) -> Collective:
    arrays = [
        (dtype, math.prod(int(side) for side in shape.split(",") if side))
        for dtype, shape in TYPE.findall(found["type"])
    ]
    if found["start"] and found["kind"] == "collective-permute":
        arrays = arrays[1:2]  # what is sent, what comes, and the state of the transfer
    elif found["start"] and found["kind"] != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]  # what is sent, what comes
    return Collective(
        found["kind"],
        "+".join(sorted({dtype for dtype, _ in arrays})),
        sum(n for _, n in arrays),
        sum(n * bits(dtype) for dtype, n in arrays) // 8,
        times,
    )


def bits(dtype: str) -> int:
    """Of an element."""
    return BITS.get(dtype) or int(dtype[1:])
