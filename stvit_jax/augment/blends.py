"""Blends of an image with a version of itself that has less of something: grey, or smoothed.

Shapes: B batch, H, W height and width.
"""

import jax
import jax.numpy as jnp

from stvit_jax.augment.catalogue import is_one_of
from stvit_jax.augment.pixels import grey, pack, to_level, unpack


def blend(degenerate: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    """`degenerate` at factor 0, `image` at factor 1, beyond it outside; levels in and out."""
    degenerate, image = degenerate.astype(jnp.float32), image.astype(jnp.float32)
    return to_level(degenerate + factor * (image - degenerate))


def recolor(packed: jax.Array, op: jax.Array, factor: jax.Array, tables: jax.Array) -> jax.Array:
    """Blends where `op` is a blend, and looks up `tables` (B, 3, 256) everywhere else."""
    op, factor = op[:, None, None], factor[:, None, None]
    colorless = grey(packed)
    recolored = []
    for index in range(3):
        channel = unpack(packed, index)
        degenerate = jnp.where(is_one_of(op, "ColorIncreasing"), colorless, _smooth(channel))
        blended = blend(degenerate, channel, factor)
        flat = channel.reshape(channel.shape[0], -1).astype(jnp.int32)
        looked_up = jnp.take_along_axis(
            tables[:, index], flat, axis=1, mode="promise_in_bounds"
        ).reshape(channel.shape)
        is_blend = is_one_of(op, "ColorIncreasing", "SharpnessIncreasing")
        recolored.append(jnp.where(is_blend, blended, looked_up))
    return pack(recolored)


def _smooth(channel: jax.Array) -> jax.Array:
    """3x3 mean of (B, H, W) with weight 5 on the centre, rounded; the border as it was."""
    height, width = channel.shape[1:]
    padded = jnp.pad(channel, ((0, 0), (1, 1), (1, 1)))
    shifted = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    smooth = (2 * (sum(shifted) + 4 * channel) + 13) // 26
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    inside = (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
    return jnp.where(inside, smooth, channel)
