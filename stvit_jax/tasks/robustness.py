"""A trained ImageNet model on the sets that test how far it carries, as evaluations.

- `imagenet2012_real`: ImageNet's validation images, labelled anew (Beyer et al., "Are we done with
  ImageNet?", arXiv 2006.07159). An image has any number of right labels; the prediction is right if
  it is one of them, and images without a label do not count.
- `imagenet_v2`: a second validation set (Recht et al., arXiv 1902.10811; `matched-frequency`).
- `imagenet_a`, `imagenet_r`: hard photographs and renditions (Hendrycks et al., arXiv 1907.07174
  and 2006.16241) of 200 classes each. The prediction is the best of these 200: the logits of all
  others are left out. Which they are is read off the labels of the set.
- `imagenet_sketch`: sketches of all classes (Wang et al., arXiv 1905.13549).

An image that does not decode counts as wrong.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from stvit_jax.data import decode
from stvit_jax.data.examples import Examples
from stvit_jax.data.normalization import normalize
from stvit_jax.data.sources.tfds import open_tfds
from stvit_jax.errors import UserError
from stvit_jax.models import fold
from stvit_jax.models.stvit import STViT
from stvit_jax.tasks import counted
from stvit_jax.training.task import Batch, Evaluation, Metrics, Variables

CLASSES = 1000
REAL = "imagenet2012_real"
SUBSETS = ("imagenet_a", "imagenet_r")

Rows = dict[str, list[np.ndarray]]


def evaluations(config: ConfigDict, model: STViT) -> tuple[Evaluation, ...]:
    """One of every set of `config.robustness`.

    Their metrics are `robustness/SET/top1`, `/top5` (but for ReaL), `/classes`, `/count` and
    `/unreadable`.

    Raises:
      UserError: a set that is not prepared, or not of ImageNet's classes.
    """
    measured = partial(measure, model)  # one function: one program serves all sets
    return tuple(
        _evaluation(name, config.data.dir, config.image_size, measured)
        for name in config.robustness
    )


def _evaluation(name: str, data_dir: str, image_size: int, measured: Callable) -> Evaluation:
    real = _set_name(name) == REAL
    variant = {"imagenet_v2": "imagenet_v2/matched-frequency"}.get(name, name)
    try:
        source = open_tfds(variant, data_dir, train=False)
    except UserError as error:
        raise UserError(f"config.robustness: {error}") from None
    classes = len(source.label_names.get("original_label" if real else "label", ()))
    if classes != CLASSES:
        raise UserError(
            f"config.robustness names {name!r}, which has {classes} classes, not ImageNet's "
            f"{CLASSES}: leave it out"
        )
    examples = Examples(
        source,
        partial(load, label="real_label" if real else "label", image_size=image_size),
        {"image": ((image_size, image_size, 3), np.uint8), "labels": ((CLASSES,), np.bool_)},
    )
    score = real_accuracy if real else partial(accuracy, subset=_set_name(name) in SUBSETS)
    return Evaluation(
        f"robustness/{name}",
        examples,
        measured,
        append,
        partial(finish, score),
        partial(describe, name),
        score="top1",
    )


def load(
    features: dict[str, Any], rng: np.random.Generator | None, *, label: str, image_size: int
) -> dict[str, np.ndarray]:
    """The evaluation crop of one example, and bool (CLASSES,): which labels are right.

    Raises:
      UnreadableImage: the image does not decode; its labels are known all the same.
    """
    labels = np.zeros(CLASSES, bool)
    labels[np.asarray(features[label], np.int64)] = True
    try:
        return {"image": decode.eval_image(features["image"], image_size), "labels": labels}
    except decode.UnreadableImage as error:
        error.known = {"labels": labels}
        raise


def measure(model: STViT, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
    """Everything that the host needs to score a batch, row by row."""
    logits = fold.fitting(model, variables).apply(variables, normalize(batch["image"]))
    return {"logits": logits} | {key: batch[key] for key in ("labels", "mask", "unreadable")}


def append(rows: Rows | None, measured: dict[str, np.ndarray]) -> Rows:
    """Joins the rows of batches, without padding."""
    rows = rows or {key: [] for key in measured}
    for key, values in measured.items():
        rows[key].append(np.asarray(values)[np.asarray(measured["mask"])])
    return rows


def finish(score: Callable[..., Metrics], rows: Rows) -> Metrics:
    """The metrics of all rows, by one of the functions below."""
    logits, labels, unreadable = (
        np.concatenate(rows[key]) for key in ("logits", "labels", "unreadable")
    )
    return score(logits, labels, unreadable == 0)


def accuracy(
    logits: np.ndarray, labels: np.ndarray, readable: np.ndarray, *, subset: bool = False
) -> Metrics:
    """Top-1 and top-5 of single labels.

    Args:
      logits: float (N, K).
      labels: bool (N, K), the one right label of each image.
      readable: bool (N,); where False, the prediction is wrong.
      subset: whether only classes that are somebody's label can be predicted.
    """
    classes = np.flatnonzero(labels.any(axis=0)) if subset else np.arange(logits.shape[1])
    best = classes[np.argsort(-logits[:, classes], axis=1, kind="stable")[:, :5]]
    hits = np.take_along_axis(labels, best, axis=1) & readable[:, None]
    return {
        "top1": float(hits[:, 0].mean()),
        "top5": float(hits.any(axis=1).mean()),
        "classes": len(classes),
        "count": len(labels),
        "unreadable": int((~readable).sum()),
    }


def real_accuracy(logits: np.ndarray, labels: np.ndarray, readable: np.ndarray) -> Metrics:
    """ReaL accuracy: how often the best class is among an image's labels; the unlabelled are out.

    Args:
      logits: float (N, K).
      labels: bool (N, K), the right labels of each image, of some images none.
      readable: bool (N,); where False, the prediction is wrong.
    """
    labelled = labels.any(axis=1)
    hits = np.take_along_axis(labels, logits.argmax(axis=1)[:, None], axis=1)[:, 0] & readable
    return {
        "top1": float(hits[labelled].mean()),
        "classes": logits.shape[1],
        "count": int(labelled.sum()),
        "unreadable": int((~readable & labelled).sum()),
    }


def describe(name: str, metrics: Metrics) -> str:
    """One line of a set's metrics."""
    top5 = f" top-5 {metrics['top5']:.4f}" if "top5" in metrics else ""
    seen = counted.describe(metrics, f", {int(metrics['classes'])} classes")
    return f"{name}: top-1 {metrics['top1']:.4f}{top5} {seen}"


def _set_name(name: str) -> str:
    """Without variant and version."""
    return name.split(":")[0].split("/")[0]
