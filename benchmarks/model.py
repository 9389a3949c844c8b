"""The network beside PyTorch's: images a second in training and inference, on CPU or an NVIDIA GPU.

    python -m benchmarks.model [--models stvit_small,stvit_tiny] [--mode train,infer] [--json FILE]

Both sides have the same network, weights and batch, on the same device and cores, and take turns in
one run; figures are images/s by the median of the rounds. Theirs is benchmarks/torch_stvit.py as a
user of PyTorch would have it fastest: channels-last, bfloat16 autocast, fused AdamW, eager and
through torch.compile (on a GPU default and max-autotune: the better counts). Ours is the step that
train.py compiles. Training is forward, loss, backward, AdamW and moving average, of a batch that is
augmented already; inference is the forward pass. Before that, both must compute the same logits and
losses. `--profile` traces some of our steps and prints their time by kind of operation. It needs
PyTorch, and neither TensorFlow nor a data set.
"""

import concurrent.futures
import importlib.util
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from stvit_jax import command_line
from stvit_jax.console import say
from stvit_jax.errors import UserError, listing

MODES = ("train", "infer")
DTYPES = ("bfloat16", "float32")
MODELS = "stvit_small,stvit_base,stvit_large"
SIZES = {"stvit_tiny": 32}  # pixels, of networks that are made for another size than 224
COLUMNS = {  # of the table: width, and how a row says it
    "model": (12, "{model}"),
    "mode": (6, "{mode}"),
    "ours": (9, "{ours:.1f}"),
    "eager": (9, "{eager:.1f}"),
    "compiled": (9, "{compiled:.1f}"),
    "/ eager": (8, "{ratio_eager:.2f}"),
    "/ comp.": (8, "{ratio_compiled:.2f}"),
    "CPU / eager": (12, "{cpu_ratio_eager:.2f}"),
    "/ comp. ": (8, "{cpu_ratio_compiled:.2f}"),
    "MFU": (6, "{mfu:.1%}"),
    "of L1": (6, "{share_of_l1:.1%}"),
    "compile s": (10, "{compile_seconds:.1f}"),
    "first s": (8, "{first_step_seconds:.2f}"),
    "peak MB": (8, "{peak_megabytes:.0f}"),
}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows in columns; `-` for what is not known."""
    lines = ["".join(f"{name:>{width}}" for name, (width, _) in COLUMNS.items())]
    for row in rows:
        memory = row["peak_memory"]
        values = row | {"peak_megabytes": None if memory is None else memory / 1e6}
        cells = []
        for width, form in COLUMNS.values():
            known = values[form.strip("{}").split(":")[0]] is not None
            cells.append(f"{form.format_map(values) if known else '-':>{width}}")
        lines.append("".join(cells))
    return lines


def row(arguments: dict[str, Any], rounds: int, profile: Path | None) -> dict[str, Any]:
    """The row of one network and mode, in a process of its own.

    What is not given is as the device has it.
    """
    # PyTorch takes the memory of the same GPU.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax

    from benchmarks import contest
    from benchmarks.case import Case

    # How long compiling takes is to be seen.
    jax.config.update("jax_enable_compilation_cache", False)
    on_cpu = jax.default_backend() == "cpu"
    defaults = {"batch_size": 8, "dtype": "float32"} if on_cpu else {}
    given = {"batch_size": 128, "dtype": "bfloat16"} | defaults
    given |= {name: value for name, value in arguments.items() if value is not None}
    return contest.run(Case(**given), rounds, profile)


def apart(arguments: dict[str, Any], *how: Any) -> dict[str, Any]:
    """`row` in a new process: memory, compiled programs and caches of others are not in it.

    Raises:
      UserError: as `contest.run`, or the system ended the process.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        try:
            return pool.submit(row, arguments, *how).result()
        except BrokenProcessPool:
            raise UserError(
                f"the process that timed {arguments['model']} was ended, most likely for want of "
                "memory; use a smaller --batch-size"
            ) from None


def chosen(flag: str, text: str, known: Sequence[str]) -> list[str]:
    """The names in a list with commas.

    Raises:
      UserError: one that is not known.
    """
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{flag}: unknown {listing(unknown)}; known: {listing(known)}")
    return names


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table, and writes its rows.

    Raises:
      UserError: a mistake in the command line, PyTorch is missing, or as `contest.run`.
    """
    from stvit_jax.models.stvit import list_models

    parser = command_line.parser("python -m benchmarks.model", __doc__)
    parser.add_argument("--models", default=MODELS, metavar="NAME,...", help=f"({MODELS})")
    parser.add_argument("--mode", default="train,infer", help="(train,infer)")
    parser.add_argument("--image-size", type=int, help="pixels (224; 32 for stvit_tiny)")
    parser.add_argument("--batch-size", type=int, help="images (128; 8 on CPU)")
    parser.add_argument("--dtype", choices=DTYPES, help="(bfloat16; float32 on CPU)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side (15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for a list of the rows")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="for XProf traces of our steps")
    args = parser.parse_args(argv)
    for flag in ("image_size", "batch_size", "rounds"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} is {value}; it must be at least 1")
    models = chosen("--models", args.models, list_models())
    modes = chosen("--mode", args.mode, MODES)
    if importlib.util.find_spec("torch") is None:
        raise UserError("the peer needs PyTorch: pip install torch")
    if args.json:
        args.json.write_text("[]\n")  # what cannot be written is known before hours have passed
    rows: list[dict[str, Any]] = []
    for model in models:
        for mode in modes:
            size = args.image_size or SIZES.get(model, 224)
            arguments = {"model": model, "mode": mode, "image_size": size}
            arguments |= {"batch_size": args.batch_size, "dtype": args.dtype}
            rows.append(apart(arguments, args.rounds, args.profile))
            if args.json:  # what has been measured is kept, whatever comes
                args.json.write_text(json.dumps(rows, indent=2) + "\n")
    first = rows[0]
    say(
        f"images/s on {first['device']} ({first['cores']} cores for each side), {first['dtype']}, "
        f"batch {first['batch_size']}, jax {first['jax']}, torch {first['torch']}; ratios are ours "
        f"/ theirs; medians of {args.rounds} rounds"
    )
    for line in table(rows):
        say(line)


if __name__ == "__main__":
    command_line.entry(main)
