"""How good a classifier is: top-1, top-5, loss; at the end, every class by itself.

Counts are sums over the whole set, so they are exact however it is split.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stvit_jax import figures
from stvit_jax.console import say
from stvit_jax.data.examples import Examples
from stvit_jax.data.normalization import normalize
from stvit_jax.errors import UserError, one_line
from stvit_jax.models import fold
from stvit_jax.models.stvit import STViT
from stvit_jax.tasks import counted
from stvit_jax.training.task import Batch, Evaluation, Metrics, Variables

MOST_CLASSES = 400  # that are counted one against the other
MOST_DRAWN = 60  # whose names fit beside a picture
WORST = 5  # that are said


def evaluation(model: STViT, evaluated: Examples, classes: tuple[str, ...]) -> Evaluation:
    """Top-1, top-5 and loss on a labelled set, and a report by class where these are not many."""
    return Evaluation(
        "eval",
        evaluated,
        partial(measure, model),
        add,
        finish,
        describe,
        score="top1",
        report=partial(report, classes) if len(classes) <= MOST_CLASSES else None,
    )


def measure(model: STViT, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
    """Sums over a batch: hits, losses (of the readable), counts. Unreadable images are wrong."""
    logits = fold.fitting(model, variables).apply(variables, normalize(batch["image"]))
    readable = batch["unreadable"] == 0
    valid = batch["mask"] & readable
    _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
    hits = (best == batch["label"][:, None]) & valid[:, None]
    k = logits.shape[-1]
    by_class = {}
    if k <= MOST_CLASSES:
        # Rows are labels, columns answers; unreadable images, whose answer is none, in the last.
        answers = jnp.where(readable, best[:, 0], k)
        counts = jnp.zeros((k, k + 1), jnp.int32).at[batch["label"], answers]
        by_class = {"confusion": counts.add(batch["mask"].astype(jnp.int32))}
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return {
        "count": jnp.sum(batch["mask"]),
        "unreadable": jnp.sum(batch["mask"] & ~readable),
        "top1": jnp.sum(hits[:, 0]),
        "top5": jnp.sum(hits),
        "loss": jnp.sum(jnp.where(valid, losses, 0)),
    } | by_class


def add(total: dict[str, Any] | None, sums: dict[str, Any]) -> dict[str, Any]:
    """Joins sums by adding them, in float64."""
    total = total or {}
    return {key: total.get(key, 0.0) + np.asarray(x, np.float64) for key, x in sums.items()}


def finish(total: dict[str, Any]) -> Metrics:
    """Rates of the sums over a whole set.

    Raises:
      UserError: no image could be read, or the loss is not finite.
    """
    seen = counted.images(total)
    count = seen["count"]
    loss = float(total["loss"]) / (count - seen["unreadable"])
    if not np.isfinite(loss):
        raise UserError(
            f"the loss of the evaluation is {loss}, so there is no result: the weights are not "
            "finite, or too large for config.dtype"
        )
    return {
        "top1": float(total["top1"]) / count,
        "top5": float(total["top5"]) / count,
        "loss": loss,
    } | seen


def describe(metrics: Metrics) -> str:
    """One line of evaluation metrics."""
    return (
        f"top-1 {metrics['top1']:.4f} top-5 {metrics['top5']:.4f} loss {metrics['loss']:.4f} "
        f"{counted.describe(metrics)}"
    )


def report(classes: tuple[str, ...], total: dict[str, Any], folder: Path) -> None:
    """Writes `per_class.json` and `confusion.png`, and says which classes are the worst.

    Raises:
      OSError, UserError: they cannot be written.
    """
    counts = total["confusion"].astype(np.int64)
    images, right = counts.sum(axis=1), np.diagonal(counts)
    rates = right / np.maximum(images, 1)
    rows = {
        name: {"images": int(n), "accuracy": round(float(rate), 6) if n else None}
        for name, n, rate in zip(classes, images, rates, strict=True)
    }
    text = json.dumps({"classes": rows, "confusion": counts[:, :-1].tolist()}, indent=1)
    (folder / "per_class.json").write_text(text + "\n")
    figures.save(draw(classes, counts[:, :-1]), folder / "confusion.png")
    seen = np.flatnonzero(images)
    worst = seen[np.argsort(rates[seen], kind="stable")][:WORST]
    said = ", ".join(f"{one_line(classes[i], 40)} {right[i]} of {images[i]}" for i in worst)
    say(f"least right: {said}; see {folder / 'per_class.json'} and confusion.png")


def draw(classes: tuple[str, ...], counts: np.ndarray) -> Any:
    """The confusion matrix as a figure: shares of every label's images.

    Args:
      classes: names by label.
      counts: integers (K, K), labels by answers.
    """
    k = len(classes)
    side = min(4 + 0.22 * k, 12)
    figure = figures.figure(side + 0.8, side)
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    drawn = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(drawn, ax=axes, label="share of the label's images")
    axes.set(xlabel="answer", ylabel="label", title=f"{int(counts.sum())} images")
    if k <= MOST_DRAWN:
        short = [figures.words(name, 24) for name in classes]
        axes.set_xticks(range(k), short, rotation=90, fontsize=7)
        axes.set_yticks(range(k), short, fontsize=7)
    if k <= 20:
        for (y, x), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[y, x] < 0.6 else "black"
                axes.text(x, y, str(count), ha="center", va="center", fontsize=7, color=colour)
    return figure
