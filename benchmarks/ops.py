"""Every hot operation of the network alone, forward and gradient, in all its forms.

    python -m benchmarks.ops [--ops depthwise,attention] [--model stvit_small] [--json FILE]

The shapes are those of the network's stages; forms take turns, a figure is a median, and a ratio
says how many times as fast as the first form, the network's own, another one is. `gradient` is the
result and the gradients of all arguments. PyTorch's form is among them where it is installed and
runs on the same device. The table of forms is benchmarks/op_forms.py.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Before JAX looks for devices: PyTorch takes the memory of the same GPU.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.model import SIZES, chosen
from benchmarks.op_forms import OPS, Stage, forms_of, forward, gradient, stages_of
from benchmarks.timing import Work, alternate, cores
from stvit_jax import command_line
from stvit_jax.console import Progress, say
from stvit_jax.errors import UserError
from stvit_jax.models.stvit import create_model, list_models

PASSES = {"forward": forward, "gradient": gradient}


def arguments_of(op: str, stage: Stage) -> dict[str, np.ndarray] | None:
    """Random arguments of an operation in a stage, by name; None where the stage has it not."""
    shapes = OPS[op].shapes(stage)
    if shapes is None:
        return None
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def ours(op: str, form: str, what: str, stage: Stage, values: Sequence[jax.Array]) -> Callable:
    """A compiled form: a function of nothing."""
    function = forms_of(op, values[0].dtype)[form]
    of = PASSES[what](function, stage)
    result = jax.eval_shape(forward(function, stage), values, None)
    dy = jnp.ones(result.shape, result.dtype)
    compiled = jax.jit(of).lower(values, dy).compile()
    return lambda: compiled(values, dy)


def repeated(once: Callable[[], Any]) -> Work:
    """For `timing.alternate`."""

    def work(times: int) -> None:
        for _ in range(times):
            result = once()
        jax.block_until_ready(result)

    return work


def peer() -> Any:
    """PyTorch's forms and its device; None where it cannot take part, which is said."""
    platform = jax.default_backend()
    if importlib.util.find_spec("torch") is None:
        say("without PyTorch's forms: it is not installed (pip install torch)")
        return None
    from benchmarks import torch_ops, torch_steps

    try:
        return torch_ops, torch_steps.prepare(platform)
    except UserError as error:
        say(f"without PyTorch's forms: {error}")
        return None


def measure(
    op: str, stage: Stage, arguments: Mapping[str, np.ndarray], torch: Any, rounds: int
) -> list[dict[str, Any]]:
    """A row for each form and pass.

    Args:
      op: its name.
      stage: whose shapes it has.
      arguments: by name.
      torch: as `peer` has it.
      rounds: turns of each form.
    """
    narrow = jax.default_backend() != "cpu"
    values = [
        jnp.asarray(x, jnp.bfloat16 if narrow and x.ndim == 4 and name != "kernel" else x.dtype)
        for name, x in arguments.items()
    ]
    theirs = torch[0].works(op, stage, arguments, torch[1], narrow) if torch else {}
    rows = []
    for what in PASSES:
        forms = forms_of(op, values[0].dtype)
        works = {form: repeated(ours(op, form, what, stage, values)) for form in forms}
        if torch:
            works["torch"] = torch[0].repeated(theirs[what], torch[1])
        for work in works.values():
            work(2)
        found = alternate(works, rounds, f"{op}, stage {stage.number}, {what}")
        first = found[next(iter(works))].wall
        rows += [
            {
                "op": op,
                "stage": stage.number,
                "shape": list(values[0].shape),
                "pass": what,
                "form": form,
                "seconds": taken.wall,
                "cpu_seconds": taken.cpu,
                "ratio": first / taken.wall,
                "device": jax.devices()[0].device_kind,
                "dtype": str(values[0].dtype),
            }
            for form, taken in found.items()
        ]
    return rows


def line_of(rows: Sequence[dict[str, Any]]) -> str:
    """The forms of one operation, stage and pass: milliseconds, and ratios to the first."""
    first, *others = rows
    shape = "x".join(map(str, first["shape"]))
    cells = [f"{first['form']} {1000 * first['seconds']:.2f} ms"]
    cells += [f"{r['form']} {1000 * r['seconds']:.2f} ({r['ratio']:.2f})" for r in others]
    return f"{first['op']:<15}{first['stage']:>2} {shape:<16}{first['pass']:<10}{', '.join(cells)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a line for each operation, stage and pass, and writes the rows.

    Raises:
      UserError: a mistake in the command line.
    """
    parser = command_line.parser("python -m benchmarks.ops", __doc__)
    parser.add_argument("--ops", default=",".join(OPS), metavar="NAME,...", help=", ".join(OPS))
    parser.add_argument(
        "--model", default="stvit_small", choices=list_models(), help="(stvit_small)"
    )
    parser.add_argument("--image-size", type=int, help="pixels (224; 32 for stvit_tiny)")
    parser.add_argument("--batch-size", type=int, help="images (128; 8 on CPU)")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each form (10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for a list of the rows")
    args = parser.parse_args(argv)
    for flag in ("image_size", "batch_size", "rounds"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} is {value}; it must be at least 1")
    names = chosen("--ops", args.ops, list(OPS))
    if args.json:
        args.json.write_text("[]\n")  # what cannot be written is known before the work
    name = args.model
    batch = args.batch_size or (8 if jax.default_backend() == "cpu" else 128)
    stages = stages_of(create_model(name), args.image_size or SIZES.get(name, 224), batch)
    torch = peer()
    say(
        f"{name}, batch {batch}, on {jax.devices()[0].device_kind} ({cores()} cores): op, stage, "
        f"shape, pass; medians of {args.rounds} rounds, in brackets times as fast as the first"
    )
    cases = [(op, stage) for op in names for stage in stages]
    rows: list[dict[str, Any]] = []
    progress = Progress("operations", len(cases))
    for number, (op, stage) in enumerate(cases):
        if (arguments := arguments_of(op, stage)) is None:
            continue
        found = measure(op, stage, arguments, torch, args.rounds)
        for what in PASSES:
            say(line_of([row for row in found if row["pass"] == what]))
        rows += [{"model": name, "batch_size": batch} | row for row in found]
        if args.json:
            args.json.write_text(json.dumps(rows, indent=2) + "\n")
        progress.update(number + 1)


if __name__ == "__main__":
    command_line.entry(main)
