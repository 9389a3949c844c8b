"""Blends of an image with a version of itself that has less of something: grey, or smoothed.

Shapes: B batch, H, W height and width.
"""

import jax
import jax.numpy as jnp

from stvit_jax.augment.catalogue import is_one_of
from stvit_jax.augment.pixels import grey, pack, to_level, unpack


def factor_of(magnitude: jax.Array, sign: jax.Array) -> jax.Array:
    """The blend factor max(0.1, 1 +- 0.09 m), as a double rounded to float32 has it.

    Where a blend is an integer, a factor that is one unit too small gives the level below; formed
    in float32, one factor in two would be off by a unit. The exact value is an integer in units
    of 2**-29 and a rest, which a last bit stands for, so that one conversion rounds it.

    Args:
      magnitude: m, float32 in 0..10; the result is exact from 1/8 on, a unit off at most below.
      sign: -1 or 1, of the same shape.

    Returns:
      Float32 in 0.1..1.9.
    """
    steps = (magnitude * 2**27).astype(jnp.int32)
    share = 9 * (steps % 25)  # 0.09 m is 9/25 of m in a quarter of its unit
    change = 9 * (steps // 25) + share // 25
    rest = (share % 25 > 0).astype(jnp.int32)
    whole = 2**29 + jnp.where(sign < 0, -change - rest, change)
    return jnp.maximum(jnp.float32(0.1), (2 * whole + rest).astype(jnp.float32) * 2.0**-30)


def blend(degenerate: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    """Truncated d + f (x - d): `degenerate` at factor 0, `image` at factor 1, beyond it outside.

    Pillow rounds the product to float32, then the sum; compilers would fuse the two and round once.
    So the product is a sum itself, of two parts of the factor that are short enough for exact
    products with a difference of 8 bits: fused or not, it is rounded once, and so is what follows.

    Args:
      degenerate: d, levels.
      image: x, levels.
      factor: f, as `factor_of` returns it.

    Returns:
      Levels, uint32.
    """
    degenerate, image = degenerate.astype(jnp.float32), image.astype(jnp.float32)
    high = jnp.floor(factor * 2**11) * 2.0**-11
    low, difference = factor - high, image - degenerate
    return to_level(degenerate + (high * difference + low * difference))


def recolor(packed: jax.Array, op: jax.Array, factor: jax.Array, tables: jax.Array) -> jax.Array:
    """Blends where `op` is a blend, and looks up `tables` (B, 3, 256) everywhere else."""
    op, factor = op[:, None, None], factor[:, None, None]
    colorless = grey(packed)
    recolored = []
    for index in range(3):
        channel = unpack(packed, index)
        degenerate = jnp.where(is_one_of(op, "ColorIncreasing"), colorless, _smooth(channel))
        blended = blend(degenerate, channel, factor)
        looked_up = jax.lax.platform_dependent(
            channel, tables[:, index], tpu=look_up_without_gather, default=look_up
        )
        is_blend = is_one_of(op, "ColorIncreasing", "SharpnessIncreasing")
        recolored.append(jnp.where(is_blend, blended, looked_up))
    return pack(recolored)


def look_up(levels: jax.Array, table: jax.Array) -> jax.Array:
    """What each image's `table` (B, 256) has for its `levels` (B, H, W)."""
    flat = levels.reshape(levels.shape[0], -1).astype(jnp.int32)
    found = jnp.take_along_axis(table, flat, axis=1, mode="promise_in_bounds")
    return found.reshape(levels.shape)


def look_up_without_gather(levels: jax.Array, table: jax.Array) -> jax.Array:
    """As `look_up`, by comparing: a TPU reads a whole tile of memory for an address."""
    every = jnp.arange(256, dtype=levels.dtype)[:, None, None, None]
    return jnp.sum(jnp.where(levels == every, table.T[:, :, None, None], 0), 0, table.dtype)


def _smooth(channel: jax.Array) -> jax.Array:
    """3x3 mean of (B, H, W) with weight 5 on the centre, rounded; the border as it was."""
    height, width = channel.shape[1:]
    padded = jnp.pad(channel, ((0, 0), (1, 1), (1, 1)))
    shifted = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    smooth = (2 * (sum(shifted) + 4 * channel) + 13) // 26
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    inside = (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
    return jnp.where(inside, smooth, channel)
