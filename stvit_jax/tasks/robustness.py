"""A trained ImageNet model on the sets that test how far it carries.

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

import contextlib
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stvit_jax import config as configs
from stvit_jax import parallel
from stvit_jax.console import Progress, say
from stvit_jax.data.loader import eval_batches
from stvit_jax.data.normalization import normalize
from stvit_jax.data.prefetch import device_prefetch
from stvit_jax.data.sources.tfds import TfdsSource, open_tfds
from stvit_jax.errors import UserError
from stvit_jax.models.stvit import create_model
from stvit_jax.training import step as training
from stvit_jax.training.evaluation import read_variables
from stvit_jax.training.metrics import MetricWriter
from stvit_jax.training.signals import STOPPED, Stop
from stvit_jax.training.workdir import make_workdir

CLASSES = 1000
REAL = "imagenet2012_real"
SUBSETS = ("imagenet_a", "imagenet_r")

Metrics = dict[str, float]


def run(config: ConfigDict, workdir: Path, stop: Stop) -> int:
    """Evaluates `config.init_from` on every set of `config.robustness`; writes to the workdir.

    `metrics.jsonl` gets `robustness/SET/top1`, `/top5` (but for ReaL), `/classes`, `/count` and
    `/unreadable`.

    Returns:
      The exit code: 0 done, 75 stopped early (nothing is written then).

    Raises:
      UserError: no weights, weights of another network, or a set that is not prepared.
    """
    if not config.init_from:
        raise UserError("config.init_from is empty: name the weights to evaluate")
    mesh = parallel.make_mesh(config.batch_size)
    sources = {name: _open(name, config.data.dir) for name in config.robustness}
    model = create_model(
        config.model.name,
        dtype=jnp.dtype(config.dtype),
        **(configs.model_settings(config) | {"num_classes": CLASSES}),
    )
    variables, _ = read_variables(model, config.init_from, config.init_from_ema, mesh)
    make_workdir(workdir)
    step = training.compile_step(
        lambda variables, batch: model.apply(variables, normalize(batch["image"])),
        variables,
        training.abstract_batch(config.batch_size, config.image_size, False),
        mesh,
        donate=False,
    )
    metrics: Metrics = {}
    for name, source in sources.items():
        batches = eval_batches(
            source,
            batch_size=config.batch_size,
            image_size=config.image_size,
            slots=parallel.own_slots(config.batch_size),
            workers=config.data.workers,
        )
        with contextlib.closing(device_prefetch(batches, parallel.by_image(mesh))) as loader:
            progress = Progress(f"evaluating {name}", len(source))
            found = []
            for batch in loader:
                if stop.requested:
                    return STOPPED
                found.append(_rows(step(variables, batch), batch, mesh))
                progress.update(min(len(found) * config.batch_size, len(source)))
        logits, labels, readable = (np.concatenate(column) for column in zip(*found, strict=True))
        if _base(name) == REAL:
            result = real_accuracy(logits, _real_labels(source), readable)
        else:
            subset = np.unique(labels) if _base(name) in SUBSETS else None
            result = accuracy(logits, labels, readable, subset)
        metrics |= {f"robustness/{name}/{key}": value for key, value in result.items()}
        say(f"{name}: {_describe(result)}")
    with contextlib.closing(MetricWriter(workdir)) as writer:
        writer.write(0, 0.0, metrics)
    return 0


def accuracy(
    logits: np.ndarray, labels: np.ndarray, readable: np.ndarray, subset: np.ndarray | None = None
) -> Metrics:
    """Top-1 and top-5 of single labels.

    Args:
      logits: float (N, K).
      labels: int (N,).
      readable: bool (N,); where False, the prediction is wrong.
      subset: the labels (sorted) that a prediction can be; None: all K.
    """
    subset = np.arange(logits.shape[1]) if subset is None else subset
    best = subset[np.argsort(-logits[:, subset], axis=1, kind="stable")[:, :5]]
    hits = (best == labels[:, None]) & readable[:, None]
    return {
        "top1": float(hits[:, 0].mean()),
        "top5": float(hits.any(axis=1).mean()),
        "classes": len(subset),
        "count": len(labels),
        "unreadable": int((~readable).sum()),
    }


def real_accuracy(
    logits: np.ndarray, label_sets: Sequence[np.ndarray], readable: np.ndarray
) -> Metrics:
    """ReaL accuracy: how often the best class is among an image's labels; the unlabelled are out.

    Args:
      logits: float (N, K).
      label_sets: N arrays of the right labels, some of them empty.
      readable: bool (N,); where False, the prediction is wrong.
    """
    labelled = np.array([len(labels) > 0 for labels in label_sets])
    hits = [
        bool(ok) and best in labels
        for best, labels, ok in zip(logits.argmax(axis=1), label_sets, readable, strict=True)
    ]
    return {
        "top1": float(np.array(hits)[labelled].mean()),
        "classes": logits.shape[1],
        "count": int(labelled.sum()),
        "unreadable": int((~readable & labelled).sum()),
    }


def _base(name: str) -> str:
    """The set's name without variant and version."""
    return name.split(":")[0].split("/")[0]


def _open(name: str, data_dir: str) -> TfdsSource:
    variant = {"imagenet_v2": "imagenet_v2/matched-frequency"}.get(name, name)
    label_key = "original_label" if _base(name) == REAL else None
    try:
        source = open_tfds(variant, data_dir, train=False, label_key=label_key)
    except UserError as error:
        raise UserError(f"config.robustness: {error}") from None
    if source.num_classes != CLASSES:
        raise UserError(
            f"config.robustness names {name!r}, which has {source.num_classes} classes, not "
            f"ImageNet's {CLASSES}: leave it out"
        )
    return source


def _real_labels(source: TfdsSource) -> list[np.ndarray]:
    # The loader's batches hold one label an image, so the records are read once more.
    progress = Progress("reading the labels", len(source))
    labels = []
    for index in range(len(source)):
        labels.append(np.asarray(source.records[index]["real_label"]))
        progress.update(index + 1)
    return labels


def _rows(logits: jax.Array, batch: dict[str, jax.Array], mesh: Mesh) -> tuple[np.ndarray, ...]:
    """Logits, labels and readable of a batch's images, without its padding, on the host."""
    whole = parallel.replicated(mesh)
    columns = (logits, batch["label"], batch["readable"], batch["mask"])
    *found, mask = jax.device_get(jax.device_put(columns, whole))
    return tuple(column[mask] for column in found)


def _describe(result: Metrics) -> str:
    top5 = f" top-5 {result['top5']:.4f}" if "top5" in result else ""
    unreadable = f", {result['unreadable']} of them unreadable" if result["unreadable"] else ""
    return (
        f"top-1 {result['top1']:.4f}{top5} "
        f"({result['count']} images{unreadable}, {result['classes']} classes)"
    )
