"""How good a segmenter is: mIoU, and the shares of pixels that are right; at the end, every class.

One matrix of labels and answers is added up over the set, so the measures are exact however it is
split. Pixels of a picture that does not decode are wrong. A scene whose annotation cannot be used
has no pixels to count: how many there are is said.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stvit_jax import figures
from stvit_jax.console import say
from stvit_jax.data.examples import Examples
from stvit_jax.data.normalization import normalize
from stvit_jax.errors import UserError, one_line
from stvit_jax.models import fold
from stvit_jax.models.segmenter import Segmenter
from stvit_jax.ops import segmentation
from stvit_jax.tasks import counted
from stvit_jax.tasks.protocol import Protocol
from stvit_jax.training.task import Batch, Evaluation, Metrics, Variables

WORST = 5  # that are said


def evaluation(
    model: Segmenter,
    evaluated: Examples,
    classes: tuple[str, ...],
    protocol: Protocol,
    batch_size: int,
) -> Evaluation:
    """The measures on a set of scenes, whose batches are as `measure` has them."""
    return Evaluation(
        "eval",
        evaluated,
        partial(measure, model, protocol),
        add,
        finish,
        describe,
        score="miou",
        report=partial(report, classes),
        batch_size=batch_size,
    )


def measure(
    model: Segmenter, protocol: Protocol, variables: Variables, batch: Batch
) -> dict[str, jax.Array]:
    """Counts of a batch.

    Args:
      model: the network.
      protocol: how it is asked.
      variables: of the network, folded or not.
      batch: `image_0`, ...: uint8 (B, h, w, 3), one a scale; `label`: uint8 (B, H, W), of which the
        first rows and columns by `size` (B, 2) are the picture's; and what the loader adds.

    Returns:
      `confusion` (K, K + 1), integers: labels by answers, the last column where there is none;
      `unlabelled`, of how many scenes no pixel has a class.
    """
    network = fold.fitting(model, variables)
    views = [normalize(batch[f"image_{i}"]) for i in range(len(protocol.scales))]
    label, size, k = batch["label"], batch["size"], model.num_classes
    scores = protocol.scores(partial(network.apply, variables), views, size, label.shape[1:])
    inside = (jnp.arange(label.shape[1]) < size[:, :1])[:, :, None]
    inside &= (jnp.arange(label.shape[2]) < size[:, 1:])[:, None, :]
    inside &= batch["mask"][:, None, None]
    readable = batch["unreadable"] == 0
    answers = jnp.where(readable[:, None, None], jnp.argmax(scores, axis=-1), k)
    label = jnp.where(inside, label, segmentation.IGNORED)
    return {
        "count": jnp.sum(batch["mask"]),
        "unreadable": jnp.sum(batch["mask"] & ~readable),
        "unlabelled": jnp.sum(batch["mask"] & jnp.all(label == segmentation.IGNORED, (1, 2))),
        "confusion": segmentation.confusion(answers, label, k),
    }


def add(total: dict[str, Any] | None, counts: dict[str, Any]) -> dict[str, Any]:
    """Joins counts by adding them, as whole numbers."""
    total = total or {}
    return {key: total.get(key, 0) + np.asarray(x, np.int64) for key, x in counts.items()}


def finish(total: dict[str, Any]) -> Metrics:
    """The measures of the counts over a whole set.

    Raises:
      UserError: no picture could be read, or no pixel has a class.
    """
    seen = counted.images(total)
    if not total["confusion"].any():
        raise UserError(
            f"no pixel of the {seen['count']} images to evaluate on has a class, so there is no "
            "result: look at their annotations"
        )
    return segmentation.scores(total["confusion"]) | seen | {"unlabelled": int(total["unlabelled"])}


def describe(metrics: Metrics) -> str:
    """One line of evaluation metrics."""
    unlabelled = int(metrics.get("unlabelled", 0))  # a run of before this was counted has none
    nothing = f", {unlabelled} without a labelled pixel" if unlabelled else ""
    return (
        f"mIoU {metrics['miou']:.4f} aAcc {metrics['aacc']:.4f} mAcc {metrics['macc']:.4f} "
        f"{counted.describe(metrics, nothing)}"
    )


def report(classes: tuple[str, ...], total: dict[str, Any], folder: Path) -> None:
    """Writes `per_class.json` and `per_class.png`, and says which classes are the worst.

    Raises:
      OSError, UserError: they cannot be written.
    """
    counts = total["confusion"].astype(np.int64)
    right, labelled = np.diagonal(counts), counts.sum(axis=1)
    union = labelled + counts.sum(axis=0)[:-1] - right
    rows = {
        name: {
            "pixels": int(labelled[i]),
            "iou": round(float(right[i] / union[i]), 6) if union[i] else None,
            "accuracy": round(float(right[i] / labelled[i]), 6) if labelled[i] else None,
        }
        for i, name in enumerate(classes)
    }
    text = json.dumps({"classes": rows, "confusion": counts[:, :-1].tolist()}, indent=1)
    (folder / "per_class.json").write_text(text + "\n")
    known = sorted((row["iou"], name) for name, row in rows.items() if row["iou"] is not None)
    figures.save(draw(known), folder / "per_class.png")
    said = ", ".join(f"{one_line(name, 40)} {iou:.3f}" for iou, name in known[:WORST])
    say(f"least IoU: {said}; see {folder / 'per_class.json'} and per_class.png")


def draw(known: list[tuple[float, str]]) -> Any:
    """A figure of bars: the IoU of every class that is labelled or answered, ascending."""
    figure = figures.figure(6, 1 + 0.16 * len(known))
    axes = figure.add_subplot()
    axes.barh(range(len(known)), [iou for iou, _ in known], color="#4c72b0")
    axes.set_yticks(range(len(known)), [figures.words(name, 24) for _, name in known], fontsize=7)
    mean = float(np.mean([iou for iou, _ in known]))
    axes.axvline(mean, color="#d62728", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(-0.6, len(known) - 0.4), xlabel="IoU", title=f"mIoU {mean:.4f}")
    return figure
