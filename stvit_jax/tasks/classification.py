"""Image classification: a soft-target cross-entropy, top-1 and top-5.

The objective augments on the device; the host only decodes, crops and flips.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stvit_jax import schedules
from stvit_jax.augment import augment_batch
from stvit_jax.checkpoints import fit
from stvit_jax.checkpoints.weights import Weights
from stvit_jax.config import model_settings
from stvit_jax.console import say, warn
from stvit_jax.data import decode
from stvit_jax.data.examples import Examples
from stvit_jax.data.normalization import MEAN, STD
from stvit_jax.data.order import Order
from stvit_jax.data.sources import open_source
from stvit_jax.errors import UserError, listing
from stvit_jax.models import fold
from stvit_jax.models.depth import multipliers
from stvit_jax.models.kernels import kernels_for
from stvit_jax.models.settings import absent
from stvit_jax.models.settings import images as input_of
from stvit_jax.models.stvit import STViT, create_model
from stvit_jax.tasks import accuracy, distillation, robustness
from stvit_jax.training.task import Batch, Picture, Task, Variables

Augment = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def task(config: ConfigDict, mesh: Mesh) -> Task:
    """See `tasks.build`. Where the config only evaluates, the training split is not opened.

    Raises:
      UserError: as `tasks.build`.
    """
    open_split = partial(open_source, config.data.source, config.data.name, config.data.dir)
    classes: tuple[str, ...] = ()
    train, steps_per_epoch = None, 1
    if not config.eval_only:  # sets that only test (imagenet_v2) have no other split
        source = open_split(train=True)
        classes = tuple(source.class_names)
        train = examples(config, source, len(classes), train=True)
        steps_per_epoch = Order(
            len(source), config.batch_size, config.group_size, config.data.repeats
        ).steps_per_epoch
    if config.robustness:
        model = create(config, mesh, robustness.CLASSES, "the robustness sets have")
        evaluations = robustness.evaluations(config, model)
    else:
        source = open_split(train=False)
        classes = tuple(source.class_names)
        model = create(config, mesh, len(classes), f"{source.name} has")
        evaluations = (
            accuracy.evaluation(
                model, examples(config, source, len(classes), train=False), classes
            ),
        )
    augment = partial(
        augment_batch,
        num_classes=model.num_classes,
        group_size=config.group_size,
        label_smoothing=config.label_smoothing,
        **config.augment,
    )
    # Pictures are made by one process, of its own.
    everywhere = partial(augment, mesh=mesh if mesh.size > 1 else None)
    drop_path = schedules.drop_path(
        config.model.drop_path_rate, config.drop_path_schedule, config.epochs, steps_per_epoch
    )
    prepared = partial(prepare, everywhere)
    criterion, given = cross_entropy, None
    if config.teacher.init_from and train is not None:
        criterion = distillation.criterion(config.teacher, cross_entropy)
        given = distillation.given(config.teacher, model, classes, prepared, adopt)
    learning = partial(
        multipliers,
        depths=model.depths,
        layer_decay=config.layer_decay,
        freeze_stages=config.freeze_stages,
        linear_probe=config.linear_probe,
    )
    frozen = config.freeze_stages > 0 or config.linear_probe
    loss = objective(model, drop_path, config.freeze_batch_norm, criterion)
    return Task(
        what=config.model.name,
        kernels=model.kernels.describe(),
        classes=classes,
        init=lambda key: model.lazy_init(key, input_of(model)),
        train=train,
        prepare=prepared,
        objective=partly(loss, learning) if frozen else loss,
        evaluations=evaluations,
        adopt=partial(adopt, model, classes),
        fold=partial(fold.folded_variables, model),
        sheet=partial(sheet, augment, classes, config.label_smoothing),
        given=given,
        multipliers=learning if frozen or config.layer_decay < 1 else None,
    )


def create(config: ConfigDict, mesh: Mesh, classes: int, whose: str) -> STViT:
    """The network of a config on a mesh, for so many classes.

    Raises:
      UserError: settings that make no network, or state another number of classes.
    """
    settings = model_settings(config, classes, whose)
    try:
        return create_model(
            config.model.name,
            dtype=jnp.dtype(config.dtype),
            group_size=config.group_size,
            remat=config.remat,
            kernels=kernels_for(config.kernels, config.dtype, mesh, config.deterministic),
            **settings,
        )
    except UserError as error:
        raise UserError(f"config.model: {error}") from None


def examples(config: ConfigDict, source: Any, classes: int, *, train: bool) -> Examples:
    """Crops and labels of a source of labelled images."""
    flip = config.data.flip if train else False
    size = config.image_size
    return Examples(
        source,
        partial(load, image_size=size, flip=flip, classes=classes),
        {"image": ((size, size, 3), np.uint8), "label": ((), np.int32)},
    )


def load(
    features: dict[str, Any],
    rng: np.random.Generator | None,
    *,
    image_size: int,
    flip: bool,
    classes: int,
) -> dict[str, Any]:
    """The crop and the label of one example, on the host; `rng` None is evaluation.

    Raises:
      UnreadableImage: the image does not decode.
      UserError: the label is not one of the classes.
    """
    label = features["label"]
    if not 0 <= label < classes:
        raise UserError(
            f"a label is {label}, and the {classes} classes are 0 to {classes - 1}: a split whose "
            "labels are withheld can neither be trained nor evaluated on; choose another data.name"
        )
    if rng is None:
        image = decode.eval_image(features["image"], image_size)
    else:
        image = decode.train_image(features["image"], image_size, rng, flip)
    return {"image": image, "label": label}


def prepare(augment: Augment, batch: Batch, key: jax.Array) -> Batch:
    """The augmented batch, as `Task.prepare`.

    Args:
      augment: (key, uint8 images, labels) to (network input, soft labels (B, K)).
      batch: as the loader gives it.
      key: of this step.
    """
    images, targets = augment(key, batch["image"], batch["label"])
    return {"image": images, "target": targets}


def cross_entropy(logits: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean over the examples of logits (B, K) against `target` (B, K), and nothing else."""
    return jnp.mean(optax.softmax_cross_entropy(logits, batch["target"])), {}


def objective(
    model: STViT,
    drop_path: schedules.Schedule,
    freeze_batch_norm: bool,
    criterion: distillation.Criterion = cross_entropy,
) -> Callable:
    """The loss of a prepared batch, as `Task.objective`.

    Args:
      model: the network.
      drop_path: rate by step.
      freeze_batch_norm: the published fine-tuning: inference mode, while all parameters train.
      criterion: of the logits.
    """

    def loss(
        params: Any, batch_stats: Any, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        variables = {"params": params, "batch_stats": batch_stats}
        if freeze_batch_norm:
            logits = model.apply(variables, batch["image"])
        else:
            logits, updated = model.apply(
                variables,
                batch["image"],
                train=True,
                drop_path_rate=drop_path(step),
                rows=batch["row"],
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            batch_stats = updated["batch_stats"]
        loss, scalars = criterion(logits, batch)
        return loss, (batch_stats, scalars)

    return loss


def partly(loss: Callable, learning: Callable[[Any], Any]) -> Callable:
    """An objective whose frozen parameters have no gradient, so that none is computed.

    Args:
      loss: as `Task.objective`.
      learning: (parameters) to multipliers, 0 where they are frozen.
    """

    def of_the_rest(params: Any, *rest: Any) -> Any:
        held = jax.tree.map(
            lambda p, m: p if m else jax.lax.stop_gradient(p), params, learning(params)
        )
        return loss(held, *rest)

    return of_the_rest


def adopt(
    model: STViT, classes: tuple[str, ...], variables: Variables, found: Weights, exact: bool
) -> Variables:
    """Weights of any form in the place of `variables`; labels keep their meaning.

    Where both sides know their classes, a head of the same ones in another order is put into ours;
    one of other classes is started anew, or refused where `exact`.

    Raises:
      UserError: weights of another network or, if `exact`, of other classes.
    """
    fit.check_heads(model, found)
    for note in found.notes:
        say(f"{found.source}: {note}")
    if exact and (missing := absent(found.variables)):
        raise UserError(
            f"{found.source} has no {' and no '.join(missing)}, so there is nothing to evaluate: "
            "train it first, with --config.init_from of this file"
        )
    if exact and fit.has_other_head(variables, found):
        raise UserError(
            f"{found.source} has a head for another number of classes than {model.num_classes}, "
            "those of the data: there is nothing to evaluate"
        )
    theirs = found.classes
    merged = fit.merge(variables, found)
    if fit.has_other_head(variables, found):  # it is started anew, whatever the names
        return merged
    if not classes or not theirs or classes == theirs or len(classes) != len(theirs):
        return merged
    if set(classes) == set(theirs):
        say(f"{found.source} has the same classes in another order; its head is put into ours")
        order = np.array([theirs.index(name) for name in classes])
        merged["params"]["head"] = jax.tree.map(
            lambda x: np.asarray(x)[..., order], merged["params"]["head"]
        )
        return merged
    i = next(i for i in range(len(classes)) if classes[i] != theirs[i])
    differing = (
        f"{found.source} was trained on other classes: its label {i} is {theirs[i]!r}, that of "
        f"the data {classes[i]!r} (only there: {listing(sorted(set(theirs) - set(classes)), 3)})"
    )
    if exact and set(classes) & set(theirs):
        raise UserError(f"{differing}: give the class folders the names that it was trained with")
    if exact:
        warn(f"{differing}; no name is shared, so label by label they are taken for the same")
        return merged
    say(f"{differing}; the head is re-initialised")
    return merged | {"params": {**merged["params"], "head": variables["params"]["head"]}}


def sheet(
    augment: Augment,
    classes: tuple[str, ...],
    label_smoothing: float,
    batch: dict[str, np.ndarray],
    key: jax.Array,
) -> list[list[Picture]]:
    """Every example as the host cut it and as the device makes it, with its labels, as trained."""
    images, targets = augment(key, batch["image"], batch["label"])
    after = np.clip((np.asarray(images) * STD + MEAN) * 255 + 0.5, 0, 255).astype(np.uint8)
    rows = []
    for i, target in enumerate(np.asarray(targets)):
        # The one or two labels that weigh more than the smoothing gives to all, heaviest first.
        own = np.flatnonzero(target > label_smoothing / len(target) + 1e-6)
        mixed = [f"{classes[k]}: {target[k]:.2f}" for k in sorted(own, key=lambda k: -target[k])]
        rows.append([(batch["image"][i], [classes[batch["label"][i]]]), (after[i], mixed)])
    return rows
