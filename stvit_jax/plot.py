"""python -m stvit_jax.plot WORKDIR ... --output PNG: the curves of one or several runs.

Loss, learning rate and the score on the evaluation set, of raw weights (solid) and of their moving
average (dashed), over epochs. A run is the folder of its `metrics.jsonl`, which may be in a bucket;
FILE may end in .png, .pdf or .svg.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stvit_jax import command_line, figures, places
from stvit_jax.console import say
from stvit_jax.errors import UserError, one_line, reason

# Panels: title, and the keys that it shows, with the dash of each. One without points is left out.
PANELS = (
    ("loss of the batches", {"train/loss": "-"}),
    ("learning rate", {"train/learning_rate": "-"}),
    ("top-1 accuracy", {"eval/top1": "-", "eval_ema/top1": "--"}),
    ("mean IoU", {"eval/miou": "-", "eval_ema/miou": "--"}),
)
AVERAGED = "eval_ema/"


def curves(workdir: Path) -> dict[str, tuple[list[float], list[float]]]:
    """What a run has written: by key, epochs and values; the last of an epoch counts.

    Raises:
      UserError: there is no file of metrics, it cannot be read, or nothing in it can be drawn.
    """
    path = workdir / "metrics.jsonl"
    try:
        with places.os_errors(path):
            text = path.read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        raise UserError(f"{workdir} is no workdir of a run: there is no metrics.jsonl") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    points: dict[str, dict[float, float]] = {}
    for line in _lines(text):
        for _, keys in PANELS:
            for key in keys:
                if _is_number(line.get(key)):
                    points.setdefault(key, {})[float(line["epoch"])] = float(line[key])
    if not points:
        raise UserError(f"{path} holds nothing to draw yet: the run has logged no step")
    return {
        key: tuple(map(list, zip(*sorted(of.items()), strict=True))) for key, of in points.items()
    }


def draw(runs: dict[str, dict[str, tuple[list[float], list[float]]]]) -> Any:
    """The figure of all runs.

    Args:
      runs: by name, what `curves` gives.
    """
    panels = [
        (title, keys)
        for title, keys in PANELS
        if any(keys.keys() & r.keys() for r in runs.values())
    ]
    figure = figures.figure(4.2 * len(panels), 3.4)
    for number, (title, keys) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        for i, (name, run) in enumerate(runs.items()):
            for key in filter(run.__contains__, keys):
                called = figures.words(name, 60)
                label = f"{called}, moving average" if key.startswith(AVERAGED) else called
                few = "." if len(run[key][0]) < 40 else ""
                axes.plot(*run[key], keys[key], marker=few, color=f"C{i}", label=label, lw=1.4)
        if len(runs) > 1 or len(keys) > 1:
            axes.legend(fontsize="small")
    return figure


def names(workdirs: Sequence[Path]) -> list[str]:
    """What a legend calls runs: the ends of their paths that tell them apart."""
    for parts in range(1, 10):
        short = ["/".join(path.parts[-parts:]) for path in workdirs]
        if len(set(short)) == len(short):
            return short
    raise UserError("a run is named twice: name each once")


def _lines(text: str) -> Iterator[dict[str, Any]]:
    """The lines that a run writes; a half one, or what others have put there, is none."""
    for line in text.splitlines():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict) and _is_number(content.get("epoch")):
            if not content.get("eval_only"):
                yield content


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf  # not NaN; an int of any length


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = command_line.parser("python -m stvit_jax.plot", __doc__)
    parser.add_argument("workdirs", metavar="WORKDIR", nargs="+")
    parser.add_argument("--output", metavar="FILE", required=True)
    known = parser.parse_args(argv)
    output = figures.output("--output", known.output)
    workdirs = [places.place("WORKDIR", text) for text in known.workdirs]
    called = names(workdirs)
    runs = {name: curves(workdir) for name, workdir in zip(called, workdirs, strict=True)}
    figures.save(draw(runs), output)
    say(f"{output}: {one_line(', '.join(runs))}")


if __name__ == "__main__":
    command_line.entry(main)
