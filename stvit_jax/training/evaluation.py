"""Exact evaluation: every image of a data set counts once."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from stvit_jax import parallel
from stvit_jax.checkpoints import fit, weights
from stvit_jax.console import Progress
from stvit_jax.errors import UserError
from stvit_jax.models import settings
from stvit_jax.models.stvit import STViT
from stvit_jax.training.signals import Stop

Sums = dict[str, float]


def read_variables(
    model: STViT, path: str | Path, ema: bool, mesh: Mesh
) -> tuple[dict[str, Any], Path]:
    """The network's variables from weights of any form, on all devices, and where they were found.

    Raises:
      UserError: no weights, or those of another network or of another number of classes.
    """
    read = weights.read(path, ema)
    fit.check_heads(model, read)
    abstract = settings.abstract(model)
    if fit.has_other_head(abstract, read):
        raise UserError(
            f"{read.source} has a head for another number of classes than {model.num_classes}, "
            "those of the data: there is nothing to evaluate"
        )
    merged = fit.merge(abstract, read)
    return jax.device_put(merged, parallel.replicated(mesh)), read.source


def evaluate(
    eval_step: Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]],
    variables: dict[str, Any],
    batches: Iterable[dict[str, jax.Array]],
    images: int,
    stop: Stop,
) -> dict[str, float] | None:
    """Metrics of one or more sets of weights in one pass over the data.

    Args:
      eval_step: (variables, batch) to sums, see `training.make_eval_step`.
      variables: name ("eval", "eval_ema") to network variables.
      batches: of the whole data set, padded and masked.
      images: in the data set.
      stop: ends the evaluation early.

    Returns:
      `NAME/top1`, `NAME/top5` (in 0..1), `NAME/loss`, `NAME/count` and `NAME/unreadable` of every
      name; None if it was stopped.
    """
    totals: dict[str, Sums] = {name: {} for name in variables}
    progress = Progress("evaluating", images)
    waiting = None  # read one batch late, so that the next is already under way
    for batch in batches:
        if stop.requested:
            return None
        sums = {name: eval_step(v, batch) for name, v in variables.items()}
        if waiting is not None:
            _add(totals, waiting)
            progress.update(int(next(iter(totals.values()))["count"]))
        waiting = sums
    _add(totals, waiting)
    metrics = {}
    for name, total in totals.items():
        count, unreadable = int(total["count"]), int(total["unreadable"])
        metrics |= {
            f"{name}/top1": total["top1"] / count,
            f"{name}/top5": total["top5"] / count,
            f"{name}/loss": total["loss"] / max(count - unreadable, 1),
            f"{name}/count": count,
            f"{name}/unreadable": unreadable,
        }
    return metrics


def describe(metrics: dict[str, Any]) -> str:
    """One line of evaluation metrics."""
    parts = []
    for name, label in (("eval", "raw"), ("eval_ema", "EMA")):
        if f"{name}/top1" in metrics:
            parts.append(
                f"{label} top-1 {metrics[f'{name}/top1']:.4f} top-5 {metrics[f'{name}/top5']:.4f} "
                f"loss {metrics[f'{name}/loss']:.4f}"
            )
    unreadable = metrics["eval/unreadable"]
    broken = f", {unreadable} of them unreadable" if unreadable else ""
    return f"{'; '.join(parts)} ({metrics['eval/count']} images{broken})"


def _add(totals: dict[str, Sums], sums: dict[str, dict[str, jax.Array]]) -> None:
    for name, values in jax.device_get(sums).items():
        for key, value in values.items():
            totals[name][key] = totals[name].get(key, 0.0) + float(value)
