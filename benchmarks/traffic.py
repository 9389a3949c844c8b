"""What a compiled program moves through device memory: the operands and results of every kernel.

A kernel is an instruction of the scheduled program; what happens inside a fusion stays on the chip.
An operand counts once a kernel and whole, even where the kernel reads a slice of it; a kernel of
our own counts alike, and so does a library's, without its workspace. What a TPU keeps on the chip
does not count. Caches are not modelled: a map of this network is larger than any.

One way to deceive such an account is a sum over products that are stacked first: every row of the
stack reads the same operands again, and they count once. `stacked_reductions` finds these.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence

from benchmarks import hlo

_ARRAY = re.compile(hlo.TYPE.pattern + r"(?:\{([^}]*)\})?")  # with its layout, and there its memory
_FREE = set(
    "parameter constant bitcast tuple get-tuple-element after-all add-dependency opt-barrier "
    "partition-id replica-id".split()
)
_MOVES = set(
    "transpose copy bitcast parameter convert slice pad constant broadcast reshape tuple "
    "concatenate get-tuple-element iota select dynamic-slice dynamic-update-slice".split()
)
_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\([^=]*?\)|\S+) (?P<op>[\w-]+)\((?P<rest>.*)"
)
_SMALL = 2**16  # elements of a stack that nobody need mind
_CALLS = re.compile(r"\b(?:calls|to_apply)=%?([\w.-]+)")
_MODULES = re.compile(r"\([A-Z]\w*(?:\.\w+)?\)+/|/[A-Z]\w*(?:\.\w+)?/")  # into those of Flax
_NO_MODULE = re.compile(r"checkpoint|rematted|step_keys|[A-Z]|.*\W")
_BLOCK = re.compile(r"layers_(\d+)/blocks_(\d+)")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An instruction that reads and writes device memory.

    Attributes:
      name: of the instruction.
      kind: gemm, convolution, attention, own, reduction, loop, move, or XLA's name.
      bytes: of operands and results, for all `times`.
      wide: those of them in float32.
      times: how often the program does it.
      where: innermost lines of this project, "depthwise.py:83 < layers.py:103"; "" if unknown.
      op_name: JAX's path of the operation.
      type: of the result.
    """

    name: str
    kind: str
    bytes: int
    wide: int
    times: int
    where: str
    op_name: str
    type: str


def kernels(program: str) -> list[Kernel]:
    """Those of a scheduled program, loops as often as they turn, of branches the first."""
    named, entry = hlo.computations(re.sub(r"/\*index=\d+\*/", "", program))
    return list(_walk(named, entry, 1, _Lines(program)))


def whole(found: Iterable[Kernel], depths: Sequence[int] | None) -> list[Kernel]:
    """Of a network of one block a stage, what one of `depths` would have; None: as they are."""
    if depths is None:
        return list(found)
    result = []
    for kernel in found:
        stage = _BLOCK.search(kernel.op_name)
        n = depths[int(stage[1])] if stage and stage[2] == "0" else 1
        changed = {key: getattr(kernel, key) * n for key in ("bytes", "wide", "times")}
        result.append(dataclasses.replace(kernel, **changed))
    return result


def stacked_reductions(program: str) -> list[str]:
    """Fusions that sum a stack of three or more arrays, larger than all that they read."""
    named, _ = hlo.computations(program)
    return [name for name, lines in named.items() if _sums_a_stack(lines)]


def summary(found: Sequence[Kernel], images: float) -> dict:
    """Kernels and MB an image: in all, by kind, and in float32."""
    kinds: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for kernel in found:
        kinds[kernel.kind][0] += kernel.times
        kinds[kernel.kind][1] += kernel.bytes / images / 1e6
    return {
        "kernels": sum(k.times for k in found),
        "megabytes_per_image": round(sum(k.bytes for k in found) / images / 1e6, 1),
        "float32_megabytes_per_image": round(sum(k.wide for k in found) / images / 1e6, 1),
        "kinds": {
            kind: {"kernels": int(n), "megabytes_per_image": round(size, 1)}
            for kind, (n, size) in sorted(kinds.items(), key=lambda item: -item[1][1])
        },
    }


def parts(found: Iterable[Kernel], images: float) -> dict[str, tuple[float, float]]:
    """MB an image of every part of a network: forward, and in the gradient; the largest first.

    A part is a module and one inside it, or outside all modules a file of this project. A fusion
    belongs to where its result is made.
    """
    sizes: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for kernel in found:
        backward = "transpose(" in kernel.op_name or "rematted" in kernel.op_name
        sizes[_part(kernel)][backward] += kernel.bytes / images / 1e6
    return {part: (x, dx) for part, (x, dx) in sorted(sizes.items(), key=lambda i: -sum(i[1]))}


def _part(kernel: Kernel) -> str:
    """The part of a network that a kernel belongs to."""
    inside = _MODULES.split(kernel.op_name, maxsplit=1)[1:]
    if inside:
        names = [name.split(".")[0] for name in inside[0].split("/")[:-1]]
        names = [name for name in dict.fromkeys(names) if not _NO_MODULE.match(name)]
        return "/".join(names[:2]).split("/blocks_")[0] or "the network"
    return kernel.where.rpartition(" < ")[2].partition(":")[0] or "other"


def report(found: Sequence[Kernel], images: float, top: int = 12) -> list[str]:
    """The account in words: by kind, by part, by source line, and the largest kernels."""
    whole = summary(found, images)
    lines = [
        f"through memory: {whole['megabytes_per_image']} MB an image in {whole['kernels']} "
        f"kernels, {whole['float32_megabytes_per_image']} of it in float32"
    ]
    for kind, row in whole["kinds"].items():
        lines.append(f"  {row['megabytes_per_image']:8.1f} MB {row['kernels']:6d} x {kind}")
    places: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0])
    for kernel in found:
        entry = places[kernel.where or kernel.op_name[-60:] or kernel.name, kernel.kind]
        entry[0] += kernel.times
        entry[1] += kernel.bytes
    lines.append("by part, forward and in the gradient:")
    for part, (x, dx) in parts(found, images).items():
        lines.append(f"  {x:8.1f} MB {dx:8.1f} MB {part}")
    lines.append("by source line and kind:")
    for (where, kind), (n, size) in sorted(places.items(), key=lambda item: -item[1][1])[:top]:
        lines.append(f"  {size / images / 1e6:8.1f} MB {n:6d} x {kind}, {where}")
    lines.append("the largest kernels:")
    for kernel in sorted(found, key=lambda k: -k.bytes)[:top]:
        size = kernel.bytes / images / 1e6
        times = f"{kernel.times} x " if kernel.times > 1 else ""
        lines.append(f"  {size:8.1f} MB {times}{kernel.name} -> {kernel.type[:90]}")
    return lines


def _walk(named: dict[str, list[str]], name: str, times: int, lines: "_Lines") -> Iterator[Kernel]:
    types: dict[str, str] = {}
    for line in named.get(name, ()):
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        op, kind = found["op"], found["type"]
        types[found["name"]] = kind
        if op in _FREE or op.endswith(("-done", "-update")):
            continue
        if op == "while":
            called = dict(re.findall(r"\b(body|condition)=%?([\w.-]+)", line))
            yield from _walk(named, called["body"], times * hlo.turns(line, named, called), lines)
        elif op in ("call", "async-start"):
            yield from _walk(named, _CALLS.search(line)[1], times, lines)
        elif op == "conditional":
            branch = re.search(r"(?:branch_computations=\{|true_computation=)%?([\w.-]+)", line)
            yield from _walk(named, branch[1], times, lines)
        else:
            yield _kernel(found, line, types, named, times, lines)


def _kernel(found, line, types, named, times, lines) -> Kernel:  # noqa: ANN001
    sizes: collections.Counter = collections.Counter()
    if found["op"] in ("copy-start", "slice-start"):
        # Of a copy (to, from), of a slice (from, to): what moves is as large as what arrives.
        one, other = _arrays(found["type"])[:2]
        size = (one if found["op"] == "copy-start" else other)[1]
        for dtype, _, outside in (one, other):
            sizes[dtype] += size * outside
    else:
        operands = dict.fromkeys(re.findall(r"%([\w.-]+)", _inside(found["rest"])))
        moved = [found["type"], *(types.get(name, "") for name in operands)]
        for i, kind in enumerate(moved):
            # A library's workspace comes as bytes among its results.
            library = i == 0 and found["op"] == "custom-call"
            for dtype, size, outside in _arrays(kind):
                sizes[dtype] += size * (outside and not (library and dtype in ("s8", "u8")))
    name = re.search(r'op_name="([^"]*)"', line)
    return Kernel(
        found["name"],
        _kind(found["op"], line, named),
        times * sum(sizes.values()),
        times * sizes["f32"],
        times,
        lines.of(line),
        name[1] if name else "",
        found["type"],
    )


def _inside(rest: str) -> str:
    """Up to the parenthesis that closes the operands."""
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return rest[:i]
    return rest


def _arrays(kind: str) -> list[tuple[str, int, bool]]:
    """Dtype and bytes of the arrays of a type, and whether they are outside the chip."""
    return [
        (
            dtype,
            math.prod(int(side) for side in shape.split(",") if side) * hlo.bits(dtype) // 8,
            "S(1)" not in layout,
        )
        for dtype, shape, layout in _ARRAY.findall(kind)
    ]


def _kind(op: str, line: str, named: dict[str, list[str]]) -> str:
    if op == "custom-call":
        target = re.search(r'custom_call_target="([^"]+)"', line)[1].lower()
        for word, kind in {
            "matmul": "gemm",
            "gemm": "gemm",
            "fmha": "attention",
            "conv": "convolution",
            "mosaic": "own",
            "tpu_custom_call": "own",
        }.items():
            if word in target:
                return kind
        return target
    if op != "fusion":
        return "move" if op in _MOVES or op in ("copy-start", "slice-start") else op
    if "triton_gemm" in line:
        return "gemm"
    inside = _fused(named, _CALLS.search(line)[1])
    for kind, words in {
        "gemm": {"dot"},
        "convolution": {"convolution"},
        "reduction": {"reduce", "reduce-window"},
        "scatter": {"scatter"},
        "gather": {"gather"},
    }.items():
        if inside & words:
            return kind
    return "loop" if inside - _MOVES else "move"


def _fused(named: dict[str, list[str]], name: str) -> set[str]:
    ops: set[str] = set()
    for line in named.get(name, ()):
        if found := _INSTRUCTION.match(line):
            ops.add(found["op"])
            if found["op"] in ("fusion", "call"):
                ops |= _fused(named, _CALLS.search(line)[1])
    return ops


def _sums_a_stack(lines: Sequence[str]) -> bool:
    """Whether a stack is summed that has more elements than all that is read for it."""
    read, stacks = 0, {}
    for line in lines:
        if not (found := _INSTRUCTION.match(line)):
            continue
        operands = re.findall(r"%([\w.-]+)", _inside(found["rest"]))
        size = _elements(found["type"])
        if found["op"] == "parameter":
            read += size
        elif found["op"] == "concatenate" and len(operands) >= 3:
            stacks[found["name"]] = size
        elif made_of := [stacks[name] for name in operands if name in stacks]:
            if found["op"] == "reduce" and max(made_of) > max(read, _SMALL):
                return True
            stacks[found["name"]] = max(made_of)
    return False


def _elements(kind: str) -> int:
    return sum(
        math.prod(int(side) for side in shape.split(",") if side)
        for _, shape in hlo.TYPE.findall(kind)
    )


class _Lines:
    """The source lines of instructions, from the tables at the head of a program."""

    def __init__(self, program: str) -> None:
        self.files = self._table(program, "FileNames", r'"(.*)"')
        self.locations = self._table(program, "FileLocations", r"\{(.*)\}")
        self.frames = self._table(program, "StackFrames", r"\{(.*)\}")

    @staticmethod
    def _table(program: str, title: str, value: str) -> dict[int, str]:
        rows = re.search(rf"^{title}\n((?:\d+ .*\n)+)", program, re.MULTILINE)
        found = re.findall(rf"^(\d+) {value}", rows[1], re.MULTILINE) if rows else []
        return {int(number): text for number, text in found}

    def of(self, line: str) -> str:
        """The two innermost of this package."""
        frame = re.search(r"stack_frame_id=(\d+)", line)
        number, found = int(frame[1]) if frame else 0, []
        while number in self.frames and len(found) < 2:
            fields = dict(re.findall(r"(\w+)=(\d+)", self.frames[number]))
            location = self.locations[int(fields["file_location_id"])]
            place = dict(re.findall(r"(\w+)=(\d+)", location))
            path = self.files[int(place["file_name_id"])]
            if "/stvit_jax/" in path:
                found.append(f"{path.rsplit('/', 1)[1]}:{place['line']}")
            number = int(fields.get("parent_frame_id", 0)) - 1
        return " < ".join(found)
