"""Mixup (Zhang et al., 2017, arXiv 1710.09412) and CutMix (Yun et al., 2019, 1905.04899), keyed.

A *group* of `group_size` neighbouring images takes the place of a device of the published script:
each group has one draw, and its partners come from the same group.

Shapes: B batch, G groups, H, W height and width, K classes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from stvit_jax.augment.boxes import Boxes, uniform_integer

_CUTMIX_PROBABILITY = 0.5  # else mixup
_MIXUP_ALPHA = 0.8
_CUTMIX_ALPHA = 1.0
_BETA_TRIES = 64  # one accepts with probability 0.5 or more: none does once in 2**64 draws


class MixDraws(NamedTuple):
    """How each group is mixed, every field (G,)."""

    cutmix: jax.Array  # bool: CutMix, else mixup
    weight: jax.Array  # float32: the lambda drawn; the weight of an image in its own mixup
    box: Boxes  # CutMix's box; drawn, and not used, for mixup too


def smooth_one_hot(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Float32 (B, K): 1 - `smoothing` + `smoothing` / K on the label, `smoothing` / K elsewhere."""
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return one_hot * (1 - smoothing) + smoothing / num_classes


def mixup_cutmix(
    key: jax.Array,
    images: jax.Array,
    targets: jax.Array,
    *,
    group_size: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Mixes each image and its target with those of its partner, as `draw_mix` has it.

    Image i of a group is mixed with image `group_size` - 1 - i of it.

    Args:
      key: of this batch.
      images: floats (B, H, W, 3).
      targets: floats (B, K), already smoothed.
      group_size: divides B; 0: the whole batch.

    Returns:
      Images and targets of the same shapes and types.
    """
    batch, height, width, _ = images.shape
    group_size = group_size or batch
    groups = batch // group_size
    draws = draw_mix(key, groups, height, width)
    box = draws.box
    area = ((box.bottom - box.top) * (box.right - box.left)).astype(jnp.float32)
    own = jnp.where(draws.cutmix, 1 - area / (height * width), draws.weight)  # (G,)

    # Mixup weighs all pixels alike; CutMix weighs a pixel 0 or 1.
    outside = ~box.contains(height, width)
    pixel_weight = jnp.where(draws.cutmix[:, None, None], outside, own[:, None, None])
    images = images.reshape(groups, group_size, *images.shape[1:])
    targets = targets.reshape(groups, group_size, -1)
    mixed_images = _mix(images, pixel_weight[:, None, :, :, None].astype(images.dtype))
    mixed_targets = _mix(targets, own[:, None, None].astype(targets.dtype))
    return mixed_images.reshape(batch, height, width, -1), mixed_targets.reshape(batch, -1)


def draw_mix(key: jax.Array, groups: int, height: int, width: int) -> MixDraws:
    """The choices of `mixup_cutmix`: one of the two with equal probability, and its lambda.

    CutMix's box has the sides int(H sqrt(1 - lambda)), int(W sqrt(1 - lambda)), before the image's
    edge cuts it, and its centre anywhere.
    """
    uniform_key, beta_key = jax.random.split(key)
    switch, down, across = jax.random.uniform(uniform_key, (groups, 3), jnp.float32).T
    cutmix = switch < _CUTMIX_PROBABILITY
    weight = _symmetric_beta(beta_key, jnp.where(cutmix, _CUTMIX_ALPHA, _MIXUP_ALPHA))

    side = jnp.sqrt(1 - weight)
    half_height = (height * side).astype(jnp.int32) // 2
    half_width = (width * side).astype(jnp.int32) // 2
    y, x = uniform_integer(down, height), uniform_integer(across, width)
    box = Boxes(
        jnp.clip(y - half_height, 0, height),
        jnp.clip(x - half_width, 0, width),
        jnp.clip(y + half_height, 0, height),
        jnp.clip(x + half_width, 0, width),
    )
    return MixDraws(cutmix, weight, box)


def _symmetric_beta(key: jax.Array, alpha: jax.Array) -> jax.Array:
    """Beta(alpha, alpha) for each of `alpha`, which are at most 1, in float32.

    Joehnk's method with all tries drawn at once. `jax.random.beta` loops until every element is
    accepted; on a GPU the host waits for the device at each turn of such a loop.
    """
    uniform = jax.random.uniform(key, (_BETA_TRIES, 2, *alpha.shape), jnp.float32)
    one, other = jnp.moveaxis(uniform ** (1 / alpha.astype(jnp.float32)), 1, 0)  # (tries, ...)
    total = one + other
    accepted = (total > 0) & (total <= 1)
    first = jnp.argmax(accepted, axis=0, keepdims=True)
    return jnp.take_along_axis(one / total, first, axis=0)[0]


def _mix(values: jax.Array, weight: jax.Array) -> jax.Array:
    """`values` (G, group, ...) against those of the group reversed; exact at weights 0 and 1."""
    return values * weight + values[:, ::-1] * (1 - weight)
