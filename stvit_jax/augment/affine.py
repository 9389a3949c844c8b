"""The geometric ops, all of them one bicubic resampling through an affine map.

Shapes: B batch, N the samples of one chunk, H, W height and width.
"""

import jax
import jax.numpy as jnp

from stvit_jax.augment.catalogue import is_one_of
from stvit_jax.augment.pixels import CHANNELS, pack, to_level, unpack

_TILE = 32  # side of the tiles that are resampled at a time
_BOX = 48  # at least 4 + 31 * (cos(30 degrees) + sin(30 degrees)) + 1
FILL = (124, 116, 104)  # what affine ops put where the image does not reach: the mean colour


def coefficients(op: jax.Array, magnitude: jax.Array, height: int, width: int) -> jax.Array:
    """(B, 6): a b c d e f with xi = a x + b y + c and yi = d x + e y + f, output to input."""
    angle = jnp.where(is_one_of(op, "Rotate"), jnp.deg2rad(3 * magnitude), 0)
    shear_x = jnp.where(is_one_of(op, "ShearX"), 0.03 * magnitude, 0)
    shear_y = jnp.where(is_one_of(op, "ShearY"), 0.03 * magnitude, 0)
    shift_x = jnp.where(is_one_of(op, "TranslateXRel"), 0.045 * magnitude * width, 0)
    shift_y = jnp.where(is_one_of(op, "TranslateYRel"), 0.045 * magnitude * height, 0)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    center_x, center_y = width / 2, height / 2
    return jnp.stack(
        [
            cos,
            shear_x - sin,
            shift_x + center_x * (1 - cos) + center_y * sin,
            shear_y + sin,
            cos,
            shift_y + center_y * (1 - cos) - center_x * sin,
        ],
        axis=1,
    )


def resample(packed: jax.Array, coefficients: jax.Array) -> jax.Array:
    """Bicubic resampling of packed images (N, H, W) through `coefficients` (N, 6)."""
    height, width = packed.shape[1:]
    a, b, c, d, e, f = (coefficients[:, index, None, None] for index in range(6))
    y, x = jnp.arange(height)[:, None] + jnp.float32(0.5), jnp.arange(width) + jnp.float32(0.5)
    input_x, input_y = a * x + b * y + c, d * x + e * y + f  # (N, H, W)
    inside = (input_x >= 0) & (input_x < width) & (input_y >= 0) & (input_y < height)

    left, top = jnp.floor(input_x - 0.5), jnp.floor(input_y - 0.5)
    right_part, lower_part = input_x - 0.5 - left, input_y - 0.5 - top
    taps = jax.lax.platform_dependent(
        *(packed, top.astype(jnp.int32) - 1, left.astype(jnp.int32) - 1),
        tpu=windows_without_gather,
        default=windows,
    )

    sampled = []
    for channel, fill in enumerate(FILL):
        levels = unpack(taps, channel).astype(jnp.float32)
        lines = [_cubic([levels[:, row, c] for c in range(4)], right_part) for row in range(4)]
        sampled.append(jnp.where(inside, to_level(_cubic(lines, lower_part)), jnp.uint32(fill)))
    return pack(sampled)


def windows(packed: jax.Array, top: jax.Array, left: jax.Array) -> jax.Array:
    """The 4x4 pixels from (`top`, `left`) on, both int32 (N, H, W): (N, 4 rows, 4 columns, H, W).

    Beyond the border are its own pixels.
    """
    height, width = packed.shape[1:]
    tap = jnp.arange(4, dtype=jnp.int32)[:, None, None]
    columns = jnp.clip(left[:, None] + tap, 0, width - 1)  # (N, 4, H, W)
    rows = jnp.clip(top[:, None] + tap, 0, height - 1)
    places = rows[:, :, None] * width + columns[:, None]  # (N, 4, 4, H, W)
    flat = packed.reshape(packed.shape[0], -1)
    taps = jnp.take_along_axis(
        flat, places.reshape(flat.shape[0], -1), axis=1, mode="promise_in_bounds"
    )
    return taps.reshape(places.shape)


def windows_without_gather(packed: jax.Array, top: jax.Array, left: jax.Array) -> jax.Array:
    """As `windows`, for windows that touch the image; what others hold is undefined.

    A TPU reads a whole tile of memory for every address. Here a tile of pixels takes the one box of
    the image in which all its windows lie, by products with one-hot rows, and by comparing columns.
    Both are exact: a level is a bfloat16. No op of RandAugment stretches a tile beyond the box.
    """
    images, height, width = packed.shape
    tall, wide = -(-height // _TILE), -(-width // _TILE)

    def tiled(starts: jax.Array) -> jax.Array:  # (N, H, W) to (N, tiles, pixels)
        outside = (0, tall * _TILE - height), (0, wide * _TILE - width)
        starts = jnp.pad(starts, ((0, 0), *outside), mode="edge")
        starts = starts.reshape(images, tall, _TILE, wide, _TILE).swapaxes(2, 3)
        return starts.reshape(images, tall * wide, _TILE**2)

    top, left = tiled(top), tiled(left)
    corner = jnp.stack([jnp.min(top, axis=-1), jnp.min(left, axis=-1)], axis=-1)  # (N, tiles, 2)
    padded = jnp.pad(packed, ((0, 0), (_BOX, _BOX), (_BOX, _BOX)), mode="edge")
    cut = lambda image, at: jax.lax.dynamic_slice(image, at + _BOX, (_BOX, _BOX))  # noqa: E731
    boxes = jax.vmap(jax.vmap(cut, (None, 0)))(padded, corner)
    levels = unpack(boxes[..., None], CHANNELS).astype(jnp.bfloat16)  # (N, tiles, y, x, 3)

    place, tap = jnp.arange(_BOX)[:, None, None], jnp.arange(4)[:, None]
    rows, columns = (
        starts[:, :, None, None] + tap == place  # (N, tiles, y or x, 4, pixels)
        for starts in (top - corner[..., :1], left - corner[..., 1:])
    )
    lines = jnp.einsum("ntyxc,ntyrp->ntxcrp", levels, rows.astype(levels.dtype))
    chosen = jnp.where(columns[:, :, :, :, None, None], lines[:, :, :, None], 0)
    chosen = jnp.sum(chosen, axis=2, dtype=jnp.float32).astype(jnp.uint32)  # (N, t, 4, 3, 4, p)
    taps = pack([chosen[:, :, :, channel] for channel in range(3)])
    taps = taps.reshape(images, tall, wide, 4, 4, _TILE, _TILE).transpose(0, 4, 3, 1, 5, 2, 6)
    taps = taps.reshape(images, 4, 4, tall * _TILE, wide * _TILE)
    return taps[..., :height, :width]


def _cubic(taps: list[jax.Array], part: jax.Array) -> jax.Array:
    """The cubic with a = -1 through four `taps`, `part` of the way from 1 to 2.

    In this form, which is Pillow's, equal taps and `part` 0 give the tap exactly: truncation
    would turn the least deficit into a whole level.
    """
    v0, v1, v2, v3 = taps
    third = v1 - v0 + v3 - v2
    second = 2 * (v0 - v1) + v2 - v3
    return v1 + part * (v2 - v0 + part * (second + part * third))
