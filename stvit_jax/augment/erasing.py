"""Random erasing (Zhong et al., 2017, arXiv 1708.04896) of normalised images, keyed.

Shapes: B batch, H, W height and width.
"""

import jax
import jax.numpy as jnp

from stvit_jax.augment.boxes import Boxes, uniform_integer

_TRIES = 10
_AREA = (0.02, 1 / 3)  # of the image
_ASPECT = (0.3, 1 / 0.3)  # height / width


def random_erasing(key: jax.Array, images: jax.Array, *, probability: float = 0.25) -> jax.Array:
    """Puts N(0, 1) noise, per pixel and channel, into one box of some images.

    Args:
      key: of this batch.
      images: normalised floats (B, H, W, 3).
      probability: with which an image has a box, see `draw_erasing`.

    Returns:
      Images of the same shape and type.
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
    uniform = jax.random.uniform(key, (batch, 2 * _TRIES + 3), jnp.float32)
    area, aspect, rest = jnp.split(uniform, [_TRIES, 2 * _TRIES], axis=1)
    erased, down, across = rest.T

    low, high = _AREA
    area = (low + (high - low) * area) * (height * width)
    low, high = jnp.log(jnp.asarray(_ASPECT, jnp.float32))
    aspect = jnp.exp(low + (high - low) * aspect)
    heights = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)  # (B, tries)
    widths = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits, axis=1, keepdims=True)
    box_height, box_width, found = (
        jnp.take_along_axis(field, first, axis=1)[:, 0] for field in (heights, widths, fits)
    )

    top = uniform_integer(down, height - box_height + 1)
    left = uniform_integer(across, width - box_width + 1)
    box_height = jnp.where(found & (erased < probability), box_height, 0)
    return Boxes(top, left, top + box_height, left + box_width)
