"""Augmentation on the device: uint8 crops and labels in, network inputs and soft labels out.

RandAugment, normalisation, random erasing (Zhong et al., 2017), and per group of images mixup
(Zhang et al., 2017) or CutMix (Yun et al., 2019) with label smoothing, as in the published recipe.
Everything is a pure function of a key and the position in the global batch: fold the step into the
key, and values depend neither on the number of devices nor on where a run was resumed.

A *group* of `group_size` neighbouring images takes the place of a device of the published script:
each group has one draw of mixup or CutMix, and its partners come from the same group.

Shapes: B batch, G groups, H, W height and width, K classes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stvit_jax.data.normalization import normalize
from stvit_jax.rand_augment import apply_op, rand_augment

__all__ = ["apply_op", "augment_batch", "mixup_cutmix", "rand_augment", "random_erasing"]

_ERASING_TRIES = 10
_ERASING_AREA = (0.02, 1 / 3)  # of the image
_ERASING_ASPECT = (0.3, 1 / 0.3)  # height / width
_CUTMIX_PROBABILITY = 0.5  # else mixup
_MIXUP_ALPHA = 0.8
_CUTMIX_ALPHA = 1.0
_BETA_TRIES = 64  # one accepts with probability 0.5 or more: none does once in 2**64 draws


class Boxes(NamedTuple):
    """One box per image or group, int32, from `top`, `left` to `bottom`, `right` (exclusive)."""

    top: jax.Array
    left: jax.Array
    bottom: jax.Array
    right: jax.Array

    def contains(self, height: int, width: int) -> jax.Array:
        """(boxes, H, W) bool: which pixels lie inside."""
        top, left, bottom, right = (edge[:, None, None] for edge in self)
        y, x = jnp.arange(height)[:, None], jnp.arange(width)
        return (top <= y) & (y < bottom) & (left <= x) & (x < right)


class MixDraws(NamedTuple):
    """How each group is mixed, every field (G,)."""

    cutmix: jax.Array  # bool: CutMix, else mixup
    weight: jax.Array  # float32: the lambda drawn; the weight of an image in its own mixup
    box: Boxes  # CutMix's box; drawn, and not used, for mixup too


def augment_batch(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int,
    group_size: int = 0,
    randaugment: bool = True,
    erasing_probability: float = 0.25,
    mixup: bool = True,
    label_smoothing: float = 0.1,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What one training step sees: float32 images (B, H, W, 3) and soft labels (B, K).

    `images` are uint8 (B, H, W, 3), `labels` int (B,). The defaults are the recipe; `randaugment`
    and `mixup` (which stands for CutMix too) can be off, `erasing_probability` 0. Without mixup the
    labels are smoothed all the same. `group_size` 0 is the whole batch. `mesh` is that over all of
    whose axes the batch is sharded, None for one device.
    """
    rand_augment_key, erasing_key, mix_key = jax.random.split(key, 3)
    if randaugment:
        images = rand_augment(rand_augment_key, images, mesh=mesh)
    images = normalize(images)
    if erasing_probability > 0:
        images = random_erasing(erasing_key, images, probability=erasing_probability)
    targets = smooth_one_hot(labels, num_classes, label_smoothing)
    if mixup:
        images, targets = mixup_cutmix(mix_key, images, targets, group_size=group_size)
    return images, targets


def smooth_one_hot(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Float32 (B, K): 1 - `smoothing` + `smoothing` / K on the label, `smoothing` / K elsewhere."""
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return one_hot * (1 - smoothing) + smoothing / num_classes


def random_erasing(key: jax.Array, images: jax.Array, *, probability: float = 0.25) -> jax.Array:
    """Puts N(0, 1) noise, per pixel and channel, into one box of some normalised images.

    `images` is float (B, H, W, 3), as is the result. Boxes are those of `draw_erasing`.
    """
    box_key, noise_key = jax.random.split(key)
    batch, height, width, _ = images.shape
    boxes = draw_erasing(box_key, batch, height, width, probability=probability)
    noise = jax.random.normal(noise_key, images.shape, jnp.float32).astype(images.dtype)
    return jnp.where(boxes.contains(height, width)[..., None], noise, images)


def draw_erasing(
    key: jax.Array, batch: int, height: int, width: int, *, probability: float
) -> Boxes:
    """The boxes to erase, (B,) each, empty where an image stays whole.

    Ten tries of area and aspect; the first box strictly smaller than the image in both directions
    counts, and an image without one stays whole.
    """
    uniform = jax.random.uniform(key, (batch, 2 * _ERASING_TRIES + 3), jnp.float32)
    area, aspect, rest = jnp.split(uniform, [_ERASING_TRIES, 2 * _ERASING_TRIES], axis=1)
    erased, down, across = rest.T

    low, high = _ERASING_AREA
    area = (low + (high - low) * area) * (height * width)
    low, high = jnp.log(jnp.asarray(_ERASING_ASPECT, jnp.float32))
    aspect = jnp.exp(low + (high - low) * aspect)
    heights = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)  # (B, tries)
    widths = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits, axis=1, keepdims=True)
    box_height, box_width, found = (
        jnp.take_along_axis(field, first, axis=1)[:, 0] for field in (heights, widths, fits)
    )

    top = _uniform_integer(down, height - box_height + 1)
    left = _uniform_integer(across, width - box_width + 1)
    box_height = jnp.where(found & (erased < probability), box_height, 0)
    return Boxes(top, left, top + box_height, left + box_width)


def mixup_cutmix(
    key: jax.Array,
    images: jax.Array,
    targets: jax.Array,
    *,
    group_size: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Mixes each image and its target with those of its partner; shapes and types stay.

    `images` is float (B, H, W, 3), `targets` float (B, K), already smoothed. Image i of a group is
    mixed with image `group_size` - 1 - i of it, by CutMix or mixup, as `draw_mix` has it.
    `group_size` 0 is the whole batch; otherwise it divides B.
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
    y, x = _uniform_integer(down, height), _uniform_integer(across, width)
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


def _uniform_integer(uniform: jax.Array, count: jax.Array | int) -> jax.Array:
    """An int32 in 0..`count` - 1 from a float32 in [0, 1)."""
    return jnp.floor(uniform * count).astype(jnp.int32)
