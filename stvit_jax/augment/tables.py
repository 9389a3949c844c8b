"""The ops that are one table of 256 levels per channel, brightness and contrast among them.

Shapes: B batch, N the samples of one chunk, H, W height and width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from stvit_jax.augment.blends import blend
from stvit_jax.augment.catalogue import is_one_of
from stvit_jax.augment.pixels import CHANNELS, grey, unpack


def _autocontrast_top() -> np.ndarray:
    """What AutoContrast makes of the highest level: (256, 256) uint8, indexed by lowest, highest.

    Exactly 255, but the rounding of Pillow's doubles leaves 254 in one case of seven, and the
    highest level may be a fifth of the image. float32 cannot tell which; the other levels whose
    exact image is an integer (one in 400 is off by one) are not worth a table.
    """
    low, high = np.ogrid[:256, :256]
    scale = 255 / np.maximum(high - low, 1)
    return (high * scale - low * scale).astype(np.uint8)


_AUTOCONTRAST_TOP = _autocontrast_top()


def op_tables(
    packed: jax.Array, op: jax.Array, magnitude: jax.Array, factor: jax.Array
) -> jax.Array:
    """The table of every table op but Equalize, identity for all else: (B, 3, 256) uint32."""
    op, magnitude, factor = (field[:, None, None] for field in (op, magnitude, factor))
    level = jnp.arange(256, dtype=jnp.int32)

    channels = unpack(packed[:, None], CHANNELS[:, None, None]).astype(jnp.int32)  # (B, 3, H, W)
    low, high = (f(channels, axis=(2, 3))[..., None] for f in (jnp.min, jnp.max))  # (B, 3, 1)
    stretched = jnp.clip(255 * (level - low) // jnp.maximum(high - low, 1), 0, 255)
    stretched = jnp.where(level == high, jnp.asarray(_AUTOCONTRAST_TOP)[low, high], stretched)

    discarded_bits = 4 + (0.4 * magnitude).astype(jnp.int32)
    threshold = 256 - (25.6 * magnitude).astype(jnp.int32)
    steps = (magnitude * 2**27).astype(jnp.int32)  # float32 would round 11 m up to the next integer
    added = 11 * (steps >> 27) + (11 * (steps & 2**27 - 1) >> 27)

    pixels = packed.shape[1] * packed.shape[2]
    total = jnp.sum(grey(packed), axis=(1, 2), dtype=jnp.uint32)  # 2**24 pixels fit
    half_up = 2 * (total % pixels) >= pixels
    mean = (total // pixels + half_up)[:, None, None]  # int(mean + 0.5)

    table = jnp.select(
        [
            is_one_of(op, "AutoContrast") & (high > low),
            is_one_of(op, "Invert"),
            is_one_of(op, "PosterizeIncreasing"),
            is_one_of(op, "SolarizeIncreasing"),
            is_one_of(op, "SolarizeAdd"),
            is_one_of(op, "BrightnessIncreasing"),
            is_one_of(op, "ContrastIncreasing"),
        ],
        [
            stretched,
            255 - level,
            level >> discarded_bits << discarded_bits,
            jnp.where(level < threshold, level, 255 - level),
            jnp.where(level < 128, jnp.minimum(level + added, 255), level),
            blend(jnp.zeros_like(level), level, factor).astype(jnp.int32),
            blend(mean, level, factor).astype(jnp.int32),
        ],
        default=level,
    )
    return table.astype(jnp.uint32)


def equalize_tables(packed: jax.Array) -> jax.Array:
    """Equalize's tables (N, 3, 256) for packed images (N, H, W)."""
    channels = unpack(packed[:, None], CHANNELS[:, None, None])  # (N, 3, H, W)
    # A histogram as matrix products of the two halves of each level, one-hot: exact, and far faster
    # on an accelerator than adding one by one to 256 addresses. One product a row of pixels, as few
    # long ones would leave most of the accelerator idle.
    high, low = (
        jax.nn.one_hot(half, 16, dtype=jnp.bfloat16) for half in (channels >> 4, channels & 15)
    )  # (N, 3, H, W, 16)
    rows = jnp.einsum("ncywh,ncywl->ncyhl", high, low, preferred_element_type=jnp.float32)
    counts = rows.sum(axis=2).reshape(packed.shape[0], 3, 256).astype(jnp.int32)

    below = jnp.cumsum(counts, axis=-1) - counts
    highest = jnp.max(channels, axis=(2, 3)).astype(jnp.int32)[..., None]
    pixels = packed.shape[1] * packed.shape[2]
    step = (pixels - jnp.take_along_axis(counts, highest, axis=-1)) // 255
    table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, table, jnp.arange(256)).astype(jnp.uint32)
