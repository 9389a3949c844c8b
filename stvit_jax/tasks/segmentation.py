"""Semantic segmentation: a class for every pixel, by the rules that the papers' numbers come from.

The host decodes, resizes, crops and mirrors; colours are distorted on the device. To evaluate,
every picture keeps its own size, see `pixels` and `protocol`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stvit_jax import figures
from stvit_jax.augment.photometric import photometric
from stvit_jax.checkpoints import fit
from stvit_jax.checkpoints.weights import Weights
from stvit_jax.config import model_settings
from stvit_jax.console import say
from stvit_jax.data import scenes
from stvit_jax.data.decode import UnreadableImage
from stvit_jax.data.examples import Examples, Group
from stvit_jax.data.normalization import MEAN, STD, normalize
from stvit_jax.data.sources.scenes import SceneSource, open_scenes
from stvit_jax.errors import UserError
from stvit_jax.models import fold
from stvit_jax.models.kernels import kernels_for
from stvit_jax.models.segmenter import Segmenter, create_segmenter
from stvit_jax.models.settings import images as input_of
from stvit_jax.models.settings import is_segmenter
from stvit_jax.ops.segmentation import IGNORED, accuracy, cross_entropy
from stvit_jax.tasks import pixels
from stvit_jax.tasks.protocol import Protocol
from stvit_jax.training.task import Batch, Picture, Task, Variables

ROUNDED_TO = 128  # sides of labels to evaluate on, so that fewer shapes are compiled
PIXELS_AT_ONCE = 2**19  # of an evaluation, on a device, where several pictures fit


def task(config: ConfigDict, mesh: Mesh) -> Task:
    """See `tasks.build`. Where the config only evaluates, the training split is not opened.

    Raises:
      UserError: as `tasks.build`.
    """
    open_split = partial(open_scenes, config.data.source, config.data.dir)
    train = None if config.eval_only else open_split(train=True)
    evaluated = open_split(train=False)
    classes = evaluated.class_names
    model = create(config, mesh, len(classes), f"{evaluated.name} has")
    own = config.segmentation
    window = config.image_size if own.test == "slide" else 0
    protocol = Protocol(tuple(own.test_scales), own.test_flip, window)
    to_evaluate, largest = whole(config, evaluated)
    together = max(1, min(config.batch_size // mesh.size, PIXELS_AT_ONCE // largest))
    return Task(
        what=f"{own.head} on {config.model.name}",
        kernels=model.backbone.kernels.describe(),
        classes=classes,
        init=lambda key: model.lazy_init(key, input_of(model)),
        train=None if train is None else crops(config, train),
        prepare=partial(prepare, own.photometric),
        objective=objective(
            model, config.model.drop_path_rate, own.auxiliary_weight, own.mean_of_labelled
        ),
        evaluations=(
            pixels.evaluation(model, to_evaluate, classes, protocol, together * mesh.size),
        ),
        adopt=partial(adopt, model, classes),
        fold=partial(fold.folded_variables, model),
        sheet=partial(sheet, own.photometric, classes, evaluated.palette),
        multipliers=partial(unless_frozen, model) if own.freeze_bn else None,
    )


def create(config: ConfigDict, mesh: Mesh, classes: int, whose: str) -> Segmenter:
    """The network of a config on a mesh, for so many classes.

    Raises:
      UserError: settings that make no network, or state another number of classes.
    """
    settings, own = model_settings(config, classes, whose), config.segmentation
    try:
        return create_segmenter(
            own.head,
            config.model.name,
            channels=own.channels,
            dropout=own.dropout,
            freeze_bn=own.freeze_bn,
            dtype=jnp.dtype(config.dtype),
            group_size=config.group_size,
            remat=config.remat,
            kernels=kernels_for(config.kernels, config.dtype, mesh, config.deterministic),
            **settings,
        )
    except UserError as error:
        raise UserError(f"config.model: {error}") from None


def crops(config: ConfigDict, source: SceneSource) -> Examples:
    """What is trained on: crops of scenes, and their labels."""
    side, own = config.image_size, config.segmentation
    cut = partial(
        scenes.train_scene,
        size=side,
        classes=source.num_classes,
        scale_range=tuple(own.scale_range),
        long=own.long_side,
        short=own.short_side,
        largest_class=own.largest_class,
        flip=config.data.flip,
    )
    spec = {
        "image": ((side, side, 3), np.uint8),
        "label": ((side, side), np.uint8),
        "size": ((2,), np.int32),
    }
    return Examples(source, partial(load_crop, cut), spec)


def load_crop(
    cut: Callable[..., dict[str, np.ndarray]], features: dict[str, Any], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """One example to train on, on the host; errors as of `scenes.train_scene`."""
    return cut(features["image"], features["annotation"], rng=rng)


def whole(config: ConfigDict, source: SceneSource) -> tuple[Examples, int]:
    """What is evaluated: whole scenes at the scales of the protocol, and labels at their own size.

    Returns:
      The examples, in groups of one shape; and the most pixels that a view or a label has.
    """
    own = config.segmentation
    box = dict(long=own.long_side, short=own.short_side)
    ratios = tuple(own.test_scales)
    resized = partial(scenes.test_scene, classes=source.num_classes, ratios=ratios, **box)
    by_shape: dict[tuple, list[int]] = {}
    for index, (height, width) in enumerate(source.sizes()):
        height, width = max(height, 1), max(width, 1)  # 0 of what cannot be read
        views = [scenes.resized_size(height, width, **box, ratio=ratio) for ratio in ratios]
        shapes = (*views, (_rounded(height), _rounded(width)))
        by_shape.setdefault(shapes, []).append(index)

    def pixels_of(shapes: tuple) -> int:
        return max(height * width for height, width in shapes)

    groups = []
    for shapes in sorted(by_shape, key=lambda s: (-pixels_of(s), s)):
        *views, label = shapes
        spec = {f"image_{i}": ((*view, 3), np.uint8) for i, view in enumerate(views)}
        spec |= {"label": (label, np.uint8), "size": ((2,), np.int32)}
        groups.append(Group(np.array(by_shape[shapes]), spec))
    examples = Examples(source, partial(load_whole, resized), groups=tuple(groups))
    return examples, max(map(pixels_of, by_shape))


def _rounded(side: int) -> int:
    return -(-side // ROUNDED_TO) * ROUNDED_TO


def load_whole(
    resized: Callable[..., dict[str, np.ndarray]], features: dict[str, Any], rng: None
) -> dict[str, np.ndarray]:
    """One example to evaluate, on the host, its label at the size of its group.

    Raises:
      UnreadableImage: as of `scenes.test_scene`.
    """
    try:
        return _grouped(resized(features["image"], features["annotation"]))
    except UnreadableImage as error:
        if "label" in error.known:
            error.known = _grouped(dict(error.known))
        raise


def _grouped(scene: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    height, width = scene["label"].shape
    label = np.full((_rounded(height), _rounded(width)), IGNORED, np.uint8)
    label[:height, :width] = scene["label"]
    return scene | {"label": label, "size": np.array([height, width], np.int32)}


def prepare(distorted: bool, batch: Batch, key: jax.Array) -> Batch:
    """The network's input and the labels, as `Task.prepare`; beyond a scene's size are zeros."""
    images = batch["image"]
    if distorted:
        images = photometric(key, images)
    inside = jnp.arange(images.shape[1]) < batch["size"][..., None]  # (B, 2, S)
    inside = inside[:, 0, :, None] & inside[:, 1, None, :]
    images = jnp.where(inside[..., None], normalize(images), 0)
    return {"image": images, "label": batch["label"]}


def objective(
    model: Segmenter, drop_path_rate: float, auxiliary_weight: float, mean_of_labelled: bool
) -> Callable:
    """The loss of a prepared batch, as `Task.objective`.

    Args:
      model: the network.
      drop_path_rate: of every step.
      auxiliary_weight: of the loss of UPerNet's second head.
      mean_of_labelled: see `cross_entropy`.
    """

    def loss(
        params: Any, batch_stats: Any, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        del step
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            batch["image"],
            train=True,
            drop_path_rate=drop_path_rate,
            rows=batch["row"],
            mutable=["batch_stats"],
            rngs={"dropout": key},
            method="head_logits",
        )
        label = batch["label"]
        criterion = partial(cross_entropy, labels=label, mean_of_labelled=mean_of_labelled)
        total = criterion(logits.main)
        scalars = {"pixel_accuracy": accuracy(logits.main, label)}
        if logits.auxiliary is not None:
            auxiliary = criterion(logits.auxiliary)
            total += auxiliary_weight * auxiliary
            scalars["auxiliary_loss"] = auxiliary
        return total, (updated["batch_stats"], scalars)

    return loss


def unless_frozen(model: Segmenter, params: Any) -> Any:
    """Multipliers of the learning rate: 0 for the backbone's BatchNorm, 1 for all else."""
    stats = jax.eval_shape(lambda: model.lazy_init(jax.random.key(0), input_of(model)))
    normalised = {
        tuple(part.key for part in path[:-1])
        for path, _ in jax.tree_util.tree_leaves_with_path(stats["batch_stats"])
        if path[0].key == "backbone"
    }
    return jax.tree_util.tree_map_with_path(
        lambda path, _: 0.0 if tuple(p.key for p in path[:-1]) in normalised else 1.0, params
    )


def adopt(
    model: Segmenter, classes: tuple[str, ...], variables: Variables, found: Weights, exact: bool
) -> Variables:
    """Weights of any form in the place of `variables`: a segmenter's, or a classifier's stages.

    Where both sides know their classes and these differ, the classifiers of pixels start anew, or
    are refused if `exact`.

    Raises:
      UserError: weights of another network or, if `exact`, of other classes.
    """
    fit.check_heads(model, found)
    for note in found.notes:
        say(f"{found.source}: {note}")
    theirs = found.classes if is_segmenter(found.variables) else None
    if exact and not is_segmenter(found.variables):
        raise UserError(
            f"{found.source} is of a network for classification, so there is nothing to evaluate: "
            "train it first, with --config.init_from of this file"
        )
    if exact and fit.has_other_head(variables, found):
        raise UserError(
            f"{found.source} has another head, or one for other classes than the {len(classes)} of "
            "the data: there is nothing to evaluate"
        )
    merged = fit.merge(variables, found)
    if theirs is None or theirs == classes or len(theirs) != len(classes):
        return merged
    i = next(i for i in range(len(classes)) if classes[i] != theirs[i])
    differing = (
        f"{found.source} was trained on other classes: its label {i} is {theirs[i]!r}, that of "
        f"the data {classes[i]!r}"
    )
    if exact:
        raise UserError(f"{differing}: give the data the classes that it was trained with")
    say(f"{differing}; what classifies pixels is re-initialised")
    ours, params = variables["params"], dict(merged["params"])
    for head in ours.keys() & {"decode_head", "auxiliary_head"}:
        params[head] = {**params[head], "conv_seg": ours[head]["conv_seg"]}
    return merged | {"params": params}


def sheet(
    distorted: bool,
    classes: tuple[str, ...],
    palette: np.ndarray,
    batch: dict[str, np.ndarray],
    key: jax.Array,
) -> list[list[Picture]]:
    """Every crop as the host cut it, and as the network sees it, under its labels."""
    seen = np.asarray(prepare(distorted, jax.tree.map(jnp.asarray, batch), key)["image"])
    after = np.clip((seen * STD + MEAN) * 255 + 0.5, 0, 255).astype(np.uint8)
    rows = []
    for image, distorted_image, label in zip(batch["image"], after, batch["label"], strict=True):
        counts = np.bincount(label[label != IGNORED], minlength=len(classes))
        shares = counts / max(counts.sum(), 1)
        named = [f"{classes[k]}: {shares[k]:.2f}" for k in np.argsort(-shares)[:2] if shares[k]]
        over = figures.overlay(distorted_image, label, palette)
        rows.append([(image, [f"{len(np.flatnonzero(counts))} classes"]), (over, named)])
    return rows
