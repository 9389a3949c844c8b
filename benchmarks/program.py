"""The compiled step of a config without the accelerator: FLOPs, bytes, memory, collectives.

    python -m benchmarks.program --target v5e:2x4 --model stvit_small --mode train --batch-size 1024
    python -m benchmarks.program --target h100 --config configs/stvit_base.py:384 --mode infer \
        --config.dtype=float32
    python -m benchmarks.program --target h100 --model upernet:stvit_small

The step is the one that train.py compiles, or eval_only with `--mode infer`, on random pictures of
1,000 classes. Targets: h100, h100:4, a100, or a TPU slice by its shape: v5e:2x4, v5e:16x16,
v4:2x2x4 (16 chips), v6e:16x16. It needs `pip install -r requirements-compilers.txt`, one core and
minutes (tens of them for a whole network on hundreds of chips); nothing is executed, so this
measures no speed. A compiler that finds no room for the step says so, and then only that is known;
before that it recomputes what it can, and the number of operations that it does twice is printed.

FLOPs and bytes are the compiler's own count, in which the body of a loop counts once; a GPU's
compiler does not count. The account of what moves through memory is ours (`traffic.py`): by kind of
kernel, by source line, the largest kernels, and what one block a stage says of a whole network.
"""

import collections
import importlib.metadata
import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from benchmarks import compilers, traffic
from benchmarks.hlo import Collective, collectives, recomputed
from stvit_jax import command_line
from stvit_jax.console import say
from stvit_jax.errors import UserError, one_line

GB = compilers.GIB
MOST_SIZES = 12  # of collectives that are printed one by one


def read_config(args: Any, overrides: Sequence[str]) -> ConfigDict:
    """The config that the command line names, with what it changes.

    Raises:
      UserError: a mistake in either.
    """
    if (args.model is None) == (args.config is None):
        raise UserError("name a network, --model stvit_small, or a config, --config configs/...")
    path, changes = args.config, []
    if path is None:
        path, changes = recipe(args.model)
    given = {
        "batch_size": args.batch_size,
        "model.depths": args.depths and _tuple("--depths", args.depths),
        "remat": args.remat and _tuple("--remat", args.remat),
        "gradient_accumulation": args.accumulation,
    }
    changes += [f"--config.{field}={value}" for field, value in given.items() if value is not None]
    return command_line.read_config(path, [*changes, *overrides])


def recipe(model: str) -> tuple[str, list[str]]:
    """The config of a network, `stvit_small` or `upernet:stvit_small`, and what it changes there.

    One without a recipe of its own has that of small.
    """
    head, _, name = model.rpartition(":")
    family, arg = {"": ("stvit", ""), "fpn": ("upernet", ":fpn")}.get(head, (head, ""))
    path = f"configs/{family}_{name.removeprefix('stvit_')}.py"
    if Path(path).is_file():
        return path + arg, []
    return f"configs/{family}_small.py{arg}", [f"--config.model.name={name}"]


def _tuple(flag: str, text: str) -> str:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(f"{flag} {one_line(text)}: write whole numbers, such as 1,1,1,1")
    return f"({text},)"


def described(
    config: ConfigDict, mode: str, target: str, chips: int, batch_size: int
) -> dict[str, Any]:
    """What a row says of what was compiled."""
    head = f"{config.segmentation.head}:" if config.task == "segmentation" else ""
    return {
        "target": target,
        "chips": chips,
        "model": head + config.model.name,
        "depths": list(config.model.depths) if config.model.depths else "whole",
        "mode": mode,
        "image_size": config.image_size,
        "dtype": config.dtype,
        "batch_size": batch_size,
        "group_size": config.group_size,
        "remat": list(config.remat),
        "accumulation": config.gradient_accumulation,
        "jax": importlib.metadata.version("jax"),
        "compiler": importlib.metadata.version(compilers.chip_of(target).packages[0]),
    }


def account(compiled: Any, images: float, depths: Sequence[int] | None) -> dict[str, Any]:
    """What a compiled step does to a chip whose share is so many images.

    `depths`: of the whole network, where the step has one block a stage; else None.
    """
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    sizes = {
        name: getattr(memory, f"{name}_size_in_bytes")
        for name in ("argument", "output", "alias", "temp", "generated_code")
    }
    text = compiled.as_text()
    held = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]
    return {
        # A GPU's compiler tells neither: products are calls of cuBLAS to it.
        "flops_per_image": cost["flops"] / images if cost else None,
        "bytes_per_image": cost["bytes accessed"] / images if cost else None,
        "peak_bytes": held + sizes["generated_code"],
        "xla_peak_bytes": memory.peak_memory_in_bytes,
        "sizes": sizes,
        "recomputed": recomputed(text),
        "collectives": grouped(collectives(text)),
        "stacked_reductions": traffic.stacked_reductions(text),
        "traffic": traffic.summary(traffic.whole(traffic.kernels(text), depths), images),
        "whole": depths is not None,
    }


def grouped(found: Iterable[Collective]) -> list[dict[str, Any]]:
    """Collectives of one kind, dtype and size in one row, the largest first."""
    counts: collections.Counter = collections.Counter()
    for c in found:
        counts[c.bytes, c.elements, c.kind, c.dtype] += c.times
    keys = ("bytes", "elements", "kind", "dtype")
    return [dict(zip(keys, k, strict=True)) | {"count": n} for k, n in sorted(counts.items())[::-1]]


def whole_depths(config: ConfigDict) -> Sequence[int] | None:
    """The depths of the variant, where the config has one block of each stage; else None."""
    from stvit_jax.models.stvit import VARIANTS  # imports JAX

    if config.model.depths is None or set(config.model.depths) != {1}:
        return None
    return VARIANTS[config.model.name]["depths"]


def needed(message: str) -> int | None:
    """The bytes of a chip that a compiler which found no room for a program asked for."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    found = found or re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", message)
    return found and round(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])))


def report(row: dict[str, Any]) -> list[str]:
    """A row in words."""
    what = "" if row["depths"] == "whole" else f" of depths {tuple(row['depths'])}"
    extras = [f"remat {tuple(row['remat'])}"] if row["remat"] else []
    extras += [f"accumulation {row['accumulation']}"] if row["accumulation"] > 1 else []
    share = row["batch_size"] / row["chips"]
    lines = [
        f"{row['model']}{what}, {row['mode']}, {row['batch_size']} images at {row['image_size']} "
        f"in {row['dtype']} on {row['chips']} chips ({row['target']}): {share:g} a chip, groups of "
        + ", ".join([str(row["group_size"] or row["batch_size"]), *extras]),
        f"compiled in {row['compile_seconds']:.0f} s",
    ]
    peak = f"{row['peak_bytes'] / GB:.1f}" if row["peak_bytes"] else "more than"
    fits = "fits" if row["fits"] else "does not fit"
    lines.append(f"peak memory of a chip: {peak} of {row['chip_bytes'] / GB:.0f} GiB: {fits}")
    if "error" in row:
        return [*lines, f"the compiler: {row['error']}"]
    if row["flops_per_image"]:
        flops, accessed = row["flops_per_image"] / 1e9, row["bytes_per_image"] / 1e6
        lines.append(f"an image: {flops:.2f} GFLOP, {accessed:.1f} MB accessed")
    if own := row["registers"]:
        spills = f"{sum(row['spilled'])} bytes spilled" if any(row["spilled"]) else "no spills"
        lines.append(f"{len(own)} kernels of our own: {min(own)} to {max(own)} registers, {spills}")
    if row["stacked_reductions"]:
        lines.append(f"sums of stacks, which no account sees: {row['stacked_reductions']}")
    if row["recomputed"]:
        lines.append(f"for want of room the compiler does {row['recomputed']} operations twice")
    return lines + collective_lines(row["collectives"])


def collective_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Collectives one size a line, or, where there are many sizes, one kind and dtype a line."""
    total = sum(r["count"] for r in rows)
    lines = [f"collectives a step: {total or 'none'}"]
    if len(rows) <= MOST_SIZES:
        return lines + [
            f"  {r['count']} x {r['kind']} {r['dtype']}, {r['bytes'] / 1e6:.3f} MB" for r in rows
        ]
    kinds: dict[tuple[str, str], list[dict]] = collections.defaultdict(list)
    for r in rows:
        kinds[r["kind"], r["dtype"]].append(r)
    for (kind, dtype), same in kinds.items():
        count, size = sum(r["count"] for r in same), sum(r["count"] * r["bytes"] for r in same)
        least, most = (f"{r['bytes'] / 1e6:.3f}" for r in (same[-1], same[0]))
        sizes = (
            f"{least} to {most} MB, {size / 1e6:.3f} MB in all" if least != most else f"{most} MB"
        )
        lines.append(f"  {count} x {kind} {dtype}, {sizes}")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles one program and tells of it.

    Raises:
      UserError: a mistake in the command line or the config, or the compiler is not installed.
    """
    parser = command_line.parser("python -m benchmarks.program", __doc__)
    parser.add_argument("--target", required=True, help=compilers.EXAMPLES)
    parser.add_argument("--model", help="a variant, or HEAD:VARIANT, with its published recipe")
    parser.add_argument("--config", metavar="configs/NAME.py[:ARG]", help="with --config.FIELD=V")
    parser.add_argument("--mode", choices=("train", "infer"), default="train")
    parser.add_argument("--batch-size", type=int, help="global; the config's")
    parser.add_argument("--depths", metavar="1,1,1,1", help="blocks a stage, for a quick look")
    parser.add_argument("--remat", metavar="0,1", help="stages to recompute: config.remat")
    parser.add_argument("--accumulation", type=int, help="config.gradient_accumulation")
    parser.add_argument("--dump-hlo", type=Path, metavar="FILE", help="the program's text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="to append a row to")
    args, rest = parser.parse_known_args(argv)
    compilers.prepare(args.target)
    config = read_config(args, rest)

    import jax

    chips = compilers.devices(args.target)
    program = compilers.program(config, args.mode, chips)
    row = described(config, args.mode, args.target, len(chips), program.batch_size)
    start = time.monotonic()
    try:
        with compilers.heard() as ptxas:
            compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        if "Ran out of memory" not in str(error):
            raise
        found = {"error": one_line(error), "peak_bytes": needed(str(error)), "fits": False}
    else:
        images = program.batch_size / len(chips)
        found = account(compiled, images, whole_depths(config))
        found |= {"registers": ptxas.registers, "spilled": ptxas.spilled}
        found["fits"] = found["peak_bytes"] <= compilers.chip_of(args.target).memory
        if args.dump_hlo:
            args.dump_hlo.write_text(compiled.as_text())
    seconds, memory = time.monotonic() - start, compilers.chip_of(args.target).memory
    row |= {"compile_seconds": round(seconds), "chip_bytes": memory} | found
    for line in report(row):
        say(line)
    if "traffic" in row:
        kernels = traffic.whole(traffic.kernels(compiled.as_text()), whole_depths(config))
        if row["whole"]:
            say("the whole network, from its one block a stage:")
        for line in traffic.report(kernels, images):
            say(line)
    if args.json:
        with args.json.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    command_line.entry(main)
