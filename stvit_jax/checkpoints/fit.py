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
    UNOPTIMIZED,
    absent,
    abstract,
    complete,
    create,
    images,
)
from stvit_jax.models.stvit import STViT
from stvit_jax.trees import differences, leaves, path_name


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
    initial = _initial(model, missing)
    variables = {
        collection: {**tree, **jax.tree.map(np.asarray, initial.get(collection, {}))}
        for collection, tree in weights.variables.items()
    }
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: x.astype(np.int64) if path[-1].key == "count" else x, variables
    )
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
      says so.

    Raises:
      UserError: anything else differs (all differences listed).
    """
    ours, theirs = leaves(variables), leaves(weights.variables)
    modules = _anew(variables, weights)
    kept = [path for path in ours if path.split("/")[1] in modules]
    dropped = tuple(m for m in absent(variables) if m not in absent(weights.variables))
    if dropped:
        say(
            f"{weights.source}: its {', '.join(dropped)} {_are(dropped)} dropped; this network has "
            "none"
        )
    if missing := tuple(m for m in absent(weights.variables) if m in modules):
        say(
            f"{weights.source}: {', '.join(missing)} {_are(missing)} not in it; re-initialised, "
            "to be trained"
        )
    elif modules:
        classes = [side["params/head/kernel"].shape[-1] for side in (theirs, ours)]
        say(
            f"{weights.source}: its head has {classes[0]} classes, this network {classes[1]}; "
            "the head is re-initialised"
        )
    differing = differences(
        {p: x for p, x in theirs.items() if p not in kept and p.split("/")[1] not in dropped},
        {path: x for path, x in ours.items() if path not in kept},
    )
    if differing:
        raise UserError(f"{weights.source} does not fit this network: {'; '.join(differing)}")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf if path_name(path) in kept else theirs[path_name(path)].astype(leaf.dtype)
        ),
        variables,
    )


def has_other_head(variables: Any, weights: Weights) -> bool:
    """Whether `merge` keeps the head of `variables`: of another class count there, or missing."""
    return "head" in _anew(variables, weights)


def check_heads(model: STViT, weights: Weights) -> None:
    """Raises UserError where the file was made with other attention heads: shapes do not show it.

    The other settings that shapes do not show, `n_iter` and `stoken_size`, are for users to change.
    """
    try:
        theirs = create(weights.settings).num_heads if weights.settings else model.num_heads
    except UserError as error:
        raise UserError(f"{weights.source}: {error}") from None
    if tuple(theirs) != tuple(model.num_heads):
        raise UserError(
            f"{weights.source} has num_heads {tuple(theirs)}, this network "
            f"{tuple(model.num_heads)}; set model.num_heads to the same"
        )


def load_weights(model: STViT, path: str | Path, ema: bool = False) -> dict[str, Any]:
    """Variables of a network from a file of any form.

    Args:
      model: of any image size and number of classes; a head of another size, or one that is not
        there, is initialised anew (key 0), and a line says so.
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


def fitted(model: STViT, weights: Weights) -> dict[str, Any]:
    """As `load_weights`, of weights as read; `model` is not folded."""
    check_heads(model, weights)
    variables = abstract(model)
    if modules := _anew(variables, weights):
        initial = _initial(model, modules)
        variables = {name: tree | initial.get(name, {}) for name, tree in variables.items()}
    return jax.tree.map(jnp.asarray, merge(variables, weights))


def _anew(variables: Any, weights: Weights) -> tuple[str, ...]:
    """The modules that these weights do not have, or have for another number of classes."""
    ours, theirs = (leaves(v).get("params/head/kernel") for v in (variables, weights.variables))
    other = (
        ours is not None
        and theirs is not None
        and ours.shape[:-1] == theirs.shape[:-1]
        and ours.shape[-1] != theirs.shape[-1]
    )
    if other:
        return ("head",)
    return tuple(m for m in absent(weights.variables) if m not in absent(variables))


def _initial(model: STViT, modules: tuple[str, ...]) -> dict[str, Any]:
    """Initial values of some modules at the top, from key 0."""

    def init(key: jax.Array) -> dict[str, Any]:
        variables = model.lazy_init(key, images(model))
        return {
            collection: {module: x for module, x in tree.items() if module in modules}
            for collection, tree in variables.items()
        }

    options = UNOPTIMIZED if jax.default_backend() == "cpu" else None
    return jax.jit(init, compiler_options=options)(jax.random.key(0))


def _are(modules: tuple[str, ...]) -> str:
    return "is" if len(modules) == 1 else "are"
