"""Fitting weights to a network: which one they are of, whether they fit, and putting them in."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from stvit_jax.checkpoints.weights import Weights, read
from stvit_jax.console import say
from stvit_jax.errors import UserError
from stvit_jax.models.settings import abstract, complete, create, images
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


def merge(variables: Any, weights: Weights) -> Any:
    """Puts weights into the variables of a network.

    Args:
      variables: `{"params": ..., "batch_stats": ...}`, arrays or `jax.ShapeDtypeStruct`s.
      weights: as read; from any image size.

    Returns:
      The same tree: numpy arrays in the dtypes of `variables`. Where the number of classes
      differs, the head's leaves are those of `variables`, and a line says so.

    Raises:
      UserError: anything else differs (all differences listed).
    """
    ours, theirs = leaves(variables), leaves(weights.variables)
    kept = []
    if has_other_head(variables, weights):
        kept = [path for path in ours if path.startswith("params/head/")]
        classes = [side["params/head/kernel"].shape[-1] for side in (theirs, ours)]
        say(
            f"{weights.source}: its head has {classes[0]} classes, this network {classes[1]}; "
            "the head is re-initialised"
        )
    differing = differences(
        {path: x for path, x in theirs.items() if path not in kept},
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
    """Whether only the number of classes tells the heads apart, so that `merge` keeps ours."""
    ours, theirs = (leaves(v).get("params/head/kernel") for v in (variables, weights.variables))
    return (
        ours is not None
        and theirs is not None
        and ours.shape[:-1] == theirs.shape[:-1]
        and ours.shape[-1] != theirs.shape[-1]
    )


def check_heads(model: STViT, weights: Weights) -> None:
    """Raises UserError where the file was made with other attention heads: shapes do not show it.

    The other settings that shapes do not show, `n_iter` and `stoken_size`, are for users to change.
    """
    theirs = create(weights.settings).num_heads if weights.settings else model.num_heads
    if tuple(theirs) != tuple(model.num_heads):
        raise UserError(
            f"{weights.source} has num_heads {tuple(theirs)}, this network "
            f"{tuple(model.num_heads)}; set model.num_heads to the same"
        )


def load_weights(model: STViT, path: str | Path, ema: bool = False) -> dict[str, Any]:
    """Variables of a network from a file of any form.

    Args:
      model: of any image size and number of classes; a head of another size is initialised anew
        (key 0), and a line says so.
      path: `.pth`, `.safetensors`, a converted directory, or the workdir of a run.
      ema: the moving average in place of the raw weights.

    Returns:
      `{"params": ..., "batch_stats": ...}` of `jax.Array`s.

    Raises:
      UserError: as `read`, or they do not fit the network (all differences listed).
    """
    weights = read(path, ema)
    check_heads(model, weights)
    variables = abstract(model)
    if has_other_head(variables, weights):
        init = jax.jit(lambda key: model.lazy_init(key, images(model))["params"]["head"])
        variables["params"]["head"] = init(jax.random.key(0))
    return jax.tree.map(jnp.asarray, merge(variables, weights))
