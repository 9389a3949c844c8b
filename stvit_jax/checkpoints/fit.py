"""Fitting weights to a network: which one they are of, whether they fit, and putting them in."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stvit_jax.checkpoints.weights import Weights, read
from stvit_jax.console import say
from stvit_jax.errors import UserError
from stvit_jax.models.settings import (
    AROUND,
    HEADS,
    TAIL,
    UNOPTIMIZED,
    Network,
    absent,
    abstract,
    backbone,
    complete,
    create,
    images,
    is_segmenter,
    without,
)
from stvit_jax.trees import differences, leaves, nested, path_name


def identify(weights: Weights, name: str | None = None, **overrides: Any) -> Weights:
    """Weights with all settings, checked against every shape.

    Args:
      weights: as read.
      name: of a variant; None: settings of the file, or the variant that has these shapes.
      **overrides: of the variant `name`, by the published names.

    Raises:
      UserError: no variant has these shapes, or not the one that was stated (with differences).
    """
    try:
        settings = complete(weights.variables, weights.settings, name, **overrides)
    except UserError as error:
        raise UserError(f"{weights.source}: {error}") from None
    return dataclasses.replace(weights, settings=settings)


def fill(weights: Weights) -> Weights:
    """Weights of a whole network: what follows the stages and is missing is initialised anew.

    Args:
      weights: with settings, see `identify`.
    """
    model = create(weights.settings)
    missing = absent(weights.variables)
    missing = tuple(module for module in missing if module in abstract(model)["params"])
    if not missing:
        return weights
    initial = {
        path: np.asarray(x, np.int64) if path.endswith("/count") else np.asarray(x)
        for path, x in _initial(model, missing).items()
    }
    variables = nested(leaves(weights.variables) | initial)
    note = f"{', '.join(missing)} {_are(missing)} not in it: initialised anew, to be trained"
    return dataclasses.replace(weights, variables=variables, notes=(*weights.notes, note))


def merge(variables: Any, weights: Weights) -> Any:
    """Puts weights into the variables of a network.

    Args:
      variables: `{"params": ..., "batch_stats": ...}`, arrays or `jax.ShapeDtypeStruct`s.
      weights: as read; from any image size.

    Returns:
      The same tree: numpy arrays in the dtypes of `variables`. Where the number of classes
      differs, or the file has no head, or nothing after the stages, these leaves are those of
      `variables`; what the file has after the stages and `variables` have not is dropped; a line
      says so. A segmenter takes the stages of a network for classification, and the other way
      round; of a segmenter with another head, what is before the head.

    Raises:
      UserError: anything else differs (all differences listed).
    """
    ours, plan = leaves(variables), _plan(variables, weights)
    for line in plan.lines:
        say(f"{weights.source}: {line}")
    differing = differences(
        {path: x for path, x in plan.theirs.items() if not _within(path, plan.anew)},
        {path: x for path, x in ours.items() if not _within(path, plan.anew)},
    )
    if differing:
        raise UserError(f"{weights.source} does not fit this network: {'; '.join(differing)}")

    def leaf(path: Any, own: Any) -> Any:
        name = path_name(path)
        return own if _within(name, plan.anew) else plan.theirs[name].astype(own.dtype)

    return jax.tree_util.tree_map_with_path(leaf, variables)


def has_other_head(variables: Any, weights: Weights) -> bool:
    """Whether `merge` keeps the head of `variables`: another one in the file, or none."""
    return any(
        module.startswith(("head", "decode_head")) for module in _plan(variables, weights).anew
    )


def check_heads(model: Network, weights: Weights) -> None:
    """Raises UserError where the file was made with other attention heads: shapes do not show it.

    The other settings that shapes do not show, `n_iter` and `stoken_size`, are for users to change.
    """
    ours = backbone(model).num_heads
    try:
        theirs = backbone(create(weights.settings)).num_heads if weights.settings else ours
    except UserError as error:
        raise UserError(f"{weights.source}: {error}") from None
    if tuple(theirs) != tuple(ours):
        raise UserError(
            f"{weights.source} has num_heads {tuple(theirs)}, this network "
            f"{tuple(ours)}; set model.num_heads to the same"
        )


def load_weights(model: Network, path: str | Path, ema: bool = False) -> dict[str, Any]:
    """Variables of a network from a file of any form.

    Args:
      model: of any image size and number of classes, for classification or a segmenter; a head of
        another size, or what is not there, is initialised anew (key 0), and a line says so, see
        `merge`.
      path: see `weights`.
      ema: the moving average in place of the raw weights.

    Returns:
      `{"params": ..., "batch_stats": ...}` of `jax.Array`s.

    Raises:
      UserError: as `read`, or they do not fit the network (all differences listed).
    """
    if model.folded:
        raise UserError(
            "no weights are those of a folded network: load them into the network that is not "
            "folded, and fold both: stvit_jax.fold_batch_norm(model, variables)"
        )
    return fitted(model, read(path, ema))


def fitted(model: Network, weights: Weights) -> dict[str, Any]:
    """As `load_weights`, of weights as read; `model` is not folded."""
    check_heads(model, weights)
    variables = abstract(model)
    if modules := _plan(variables, weights).anew:
        initial = _initial(model, modules)
        variables = nested({path: initial.get(path, x) for path, x in leaves(variables).items()})
    return jax.tree.map(jnp.asarray, merge(variables, weights))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How weights go into the variables of a network.

    Attributes:
      theirs: leaves of the file, by their paths in the network, without what is dropped.
      anew: modules of the network that these weights leave as they are.
      lines: what is to be said of it.
    """

    theirs: dict[str, Any]
    anew: tuple[str, ...]
    lines: tuple[str, ...]


def _plan(variables: Any, weights: Weights) -> _Plan:
    held, lines, anew = weights.variables, [], ()
    into, out_of = is_segmenter(variables), is_segmenter(held)
    ours, modules = leaves(variables), variables["params"]
    if into and not out_of:
        may_miss, dropped = AROUND, tuple(m for m in TAIL if m in held["params"])
        held = {name: {"backbone": tree} for name, tree in without(held, TAIL).items()}
    elif out_of and not into:
        may_miss, dropped = TAIL, tuple(m for m in held["params"] if m != "backbone")
        held = {name: tree.get("backbone", {}) for name, tree in held.items()}
    else:
        may_miss = () if into else TAIL
        dropped = tuple(m for m in may_miss if m in held["params"] and m not in modules)
        held = without(held, dropped)
    if dropped:
        lines.append(f"its {', '.join(dropped)} {_are(dropped)} dropped; this network has none")
    theirs = leaves(held)
    missing = tuple(m for m in may_miss if m in modules and m not in held["params"])
    if missing:
        anew = missing
        lines.append(
            f"{', '.join(missing)} {_are(missing)} not in it; re-initialised, to be trained"
        )
    elif into:
        kinds, widths, classes = zip(_head(theirs), _head(ours), strict=True)
        if (kinds[0], widths[0]) != (kinds[1], widths[1]):
            anew = HEADS
            lines.append(
                f"its head is {kinds[0]} of {widths[0]} channels, that of this network {kinds[1]} "
                f"of {widths[1]}; the head is re-initialised"
            )
        elif classes[0] != classes[1]:
            anew = tuple(f"{head}/conv_seg" for head in HEADS)
            lines.append(
                f"its head has {classes[0]} classes, this network {classes[1]}; conv_seg is "
                "re-initialised"
            )
    else:
        shapes = [side.get("params/head/kernel", np.zeros(0)).shape for side in (theirs, ours)]
        if shapes[0][:-1] == shapes[1][:-1] and shapes[0] != shapes[1]:
            anew = ("head",)
            lines.append(
                f"its head has {shapes[0][-1]} classes, this network {shapes[1][-1]}; the head is "
                "re-initialised"
            )
    return _Plan(theirs, anew, tuple(lines))


def _head(paths: dict[str, Any]) -> tuple[str, int | None, int | None]:
    """Kind, width and number of classes of a segmenter's head."""
    kernel = paths.get("params/decode_head/conv_seg/kernel")
    width, classes = (None, None) if kernel is None or kernel.ndim != 2 else kernel.shape
    neck = any(path.startswith("params/decode_head/neck/") for path in paths)
    return "fpn" if neck else "upernet", width, classes


def _within(path: str, modules: tuple[str, ...]) -> bool:
    """Whether a leaf, `params/head/kernel`, is in one of these modules."""
    return f"{path.partition('/')[2]}/".startswith(tuple(f"{module}/" for module in modules))


def _initial(model: Network, modules: tuple[str, ...]) -> dict[str, jax.Array]:
    """Initial values of the leaves of some modules, from key 0."""

    def init(key: jax.Array) -> dict[str, jax.Array]:
        whole = leaves(model.lazy_init(key, images(model)))
        return {path: x for path, x in whole.items() if _within(path, modules)}

    options = UNOPTIMIZED if jax.default_backend() == "cpu" else None
    return jax.jit(init, compiler_options=options)(jax.random.key(0))


def _are(modules: tuple[str, ...]) -> str:
    return "is" if len(modules) == 1 else "are"
