"""AdamW with the published rules of weight decay, and the moving average of the weights."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from stvit_jax.schedules import Schedule


def adamw(
    learning_rate: Schedule,
    weight_decay: float,
    gradient_clip: float = 0.0,
    multipliers: Callable[[Any], Any] | None = None,
    decayed: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """Decoupled AdamW: betas 0.9 0.999, eps 1e-8.

    Args:
      learning_rate: by step.
      weight_decay: its factor.
      gradient_clip: the largest global norm of a gradient, longer ones are scaled to it; 0: none,
        as published, and then the state is AdamW's alone.
      multipliers: (parameters) to what the learning rate of each is multiplied with, in its decay,
        too; None: all alike.
      decayed: (parameters) to True where weight decay acts, one of `DECAYED`; None: `decay_mask`.
    """
    tx = optax.adamw(learning_rate, weight_decay=weight_decay, mask=decayed or decay_mask)
    if multipliers:
        own = optax.stateless(lambda u, p: jax.tree.map(lambda x, m: x * m, u, multipliers(p)))
        tx = optax.chain(tx, own)
    return optax.chain(optax.clip_by_global_norm(gradient_clip), tx) if gradient_clip else tx


def decay_mask(params: Any) -> Any:
    """True for leaves that weight decay acts on.

    Published: not on tensors with one dimension, nor on biases. Layer scales are 4-D in PyTorch, so
    they are decayed; here they have one dimension, hence the rule by name.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in ("bias", "scale"), params
    )


def unless_norm(params: Any) -> Any:
    """True for leaves that have no `norm` in their name, the rule of segmentation's papers.

    It was meant for normalisations and finds those that are called so: LayerNorms, and the
    BatchNorm of a block's second half. All others are decayed, as are biases and layer scales.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any("norm" in part.key for part in path), params
    )


def everywhere(params: Any) -> Any:
    """True for all leaves."""
    return jax.tree.map(lambda _: True, params)


DECAYED = {"1d": decay_mask, "mmseg": unless_norm, "all": everywhere}  # by config.decay


def update_average(average: Any, values: Any, decay: float) -> Any:
    """One step of the moving average over parameters and statistics; no bias correction.

    Integer leaves (BatchNorm's counters) are truncated, as `Tensor.copy_` does in the published
    code.
    """
    return jax.tree.map(lambda a, v: (decay * a + (1 - decay) * v).astype(a.dtype), average, values)
