"""Pixels as one uint32 each, R | G << 8 | B << 16, so that a tap of a gather is one load.

Levels are what a channel of a pixel holds, 0..255.
"""

import jax
import jax.numpy as jnp
import numpy as np

CHANNELS = np.arange(3, dtype=np.uint32)


def pack(channels: list[jax.Array]) -> jax.Array:
    """Three arrays of levels, uint32, as one."""
    red, green, blue = channels
    return red | green << 8 | blue << 16


def unpack(packed: jax.Array, channel: int | np.ndarray) -> jax.Array:
    """The levels of one channel; of several where `channel` is an array, by broadcasting.

    Stacking the channels one by one would make XLA store them.
    """
    return packed >> (8 * channel) & 255


def grey(packed: jax.Array) -> jax.Array:
    """Pillow's luminance, in levels."""
    red, green, blue = (unpack(packed, channel) for channel in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def to_level(value: jax.Array) -> jax.Array:
    """A float as Pillow stores it: clipped to 0..255 and truncated."""
    return jnp.clip(value, 0, 255).astype(jnp.uint32)
