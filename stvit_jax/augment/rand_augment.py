"""RandAugment (Cubuk et al., 2019) on the device: `rand-m9-mstd0.5-inc1`, on uint8 images.

The fifteen ops are three families, and a sample has at most one op a round:

- affine: one bicubic gather (Rotate, ShearX/Y, TranslateX/YRel),
- table: one 256-entry table per channel (AutoContrast, Equalize, Invert, Posterize, Solarize,
  SolarizeAdd, Brightness, Contrast),
- blend: the image against a smoother version of itself (Color, Sharpness).

What each op computes is what Pillow computes. Departures: float32 where Pillow uses double, hence a
level of difference on a few pixels; and Posterize to 0 bits is black, where new Pillow raises.

Tables and blends run over the whole batch in one pass, with identity parameters where another
family was drawn. The affine gather and Equalize's histogram cost far more per pixel and are needed
by one sample in six and one in thirty, so `_where_chosen` runs them on those samples alone, a few
at a time. It picks samples by index, which must not cross devices: a sharded batch goes through
`shard_map`, hence the argument `mesh`.

Pixels travel as one uint32, R | G << 8 | B << 16, so that a tap of the gather is one load.

Shapes: B batch, N the samples of one chunk, H, W height and width.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from stvit_jax.errors import UserError

OPS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "ColorIncreasing",
    "ContrastIncreasing",
    "BrightnessIncreasing",
    "SharpnessIncreasing",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
NO_OP = -1  # the op index of a sample that a round leaves alone
MAX_MAGNITUDE = 10.0
FILL = (124, 116, 104)  # what affine ops put where the image does not reach: the mean colour
_CHANNELS = np.arange(3, dtype=np.uint32)
_CHUNK = 16  # samples that `_where_chosen` takes at a time: enough pixels to fill a GPU


class Draws(NamedTuple):
    """What RandAugment does to each sample in each round, every field (B, num_ops)."""

    op: jax.Array  # int32, index into OPS, or NO_OP
    magnitude: jax.Array  # float32, 0..10
    sign: jax.Array  # float32, -1 or 1, ignored by ops without a sign


def rand_augment(
    key: jax.Array,
    images: jax.Array,
    *,
    magnitude: float = 9.0,
    magnitude_std: float = 0.5,
    num_ops: int = 2,
    prob: float = 0.5,
    mesh: Mesh | None = None,
) -> jax.Array:
    """RandAugment on a batch of uint8 images (B, H, W, 3), same shape and type out.

    `num_ops` ops are drawn with replacement, each applied with probability `prob`, at a magnitude
    drawn from N(`magnitude`, `magnitude_std`) and clipped to 0..10, negative with probability 0.5.
    Sample i depends on `key`, i and its image alone. `mesh` must be given when the batch axis is
    sharded, over all axes of that mesh; values do not depend on it.
    """
    draws = draw(
        key,
        images.shape[0],
        magnitude=magnitude,
        magnitude_std=magnitude_std,
        num_ops=num_ops,
        prob=prob,
    )
    if mesh is None:
        return apply_draws(images, draws)
    batch = PartitionSpec(mesh.axis_names)
    return jax.shard_map(apply_draws, mesh=mesh, in_specs=batch, out_specs=batch)(images, draws)


def draw(
    key: jax.Array,
    batch: int,
    *,
    magnitude: float,
    magnitude_std: float,
    num_ops: int,
    prob: float,
) -> Draws:
    """The random choices of `rand_augment` for `batch` samples."""

    uniform_key, normal_key = jax.random.split(key)
    which, applied, negative = jnp.moveaxis(
        jax.random.uniform(uniform_key, (batch, num_ops, 3), jnp.float32), -1, 0
    )
    deviation = jax.random.normal(normal_key, (batch, num_ops), jnp.float32)
    op = jnp.floor(which * len(OPS)).astype(jnp.int32)
    return Draws(
        jnp.where(applied < prob, op, NO_OP),
        jnp.clip(magnitude + magnitude_std * deviation, 0.0, MAX_MAGNITUDE),
        jnp.where(negative < 0.5, jnp.float32(-1), jnp.float32(1)),
    )


def apply_op(image: jax.Array, op: str, magnitude: float, negate: bool) -> jax.Array:
    """One op by its name in `OPS` on one uint8 image (H, W, 3), same shape and type out.

    `magnitude` is in 0..10; `negate` turns the sign of ops that have one. Runs the code of
    `rand_augment` on a batch of one. Raises `UserError` for an unknown op.
    """
    if op not in OPS:
        raise UserError(f"unknown RandAugment op {op!r}: use one of {', '.join(OPS)}")
    draws = Draws(
        jnp.full((1, 1), OPS.index(op), jnp.int32),
        jnp.full((1, 1), magnitude, jnp.float32),
        jnp.full((1, 1), -1 if negate else 1, jnp.float32),
    )
    return _apply_draws_jit(jnp.asarray(image)[None], draws)[0]


def apply_draws(images: jax.Array, draws: Draws) -> jax.Array:
    """Does to the uint8 images (B, H, W, 3) what `draws` says, round by round."""
    packed = _pack([images[..., channel].astype(jnp.uint32) for channel in range(3)])

    def one_round(index: int, packed: jax.Array) -> jax.Array:
        return _apply_round(packed, *(field[:, index] for field in draws))

    packed = jax.lax.fori_loop(0, draws.op.shape[1], one_round, packed)
    return _unpack(packed[..., None], _CHANNELS).astype(jnp.uint8)


_apply_draws_jit = jax.jit(apply_draws)


def _apply_round(
    packed: jax.Array, op: jax.Array, magnitude: jax.Array, sign: jax.Array
) -> jax.Array:
    """One op, or none, on each packed image (B, H, W); `op`, `magnitude`, `sign` are (B,)."""
    factor = jnp.maximum(0.1, 1 + 0.09 * sign * magnitude)
    tables = _tables(packed, op, magnitude, factor)
    tables = _where_chosen(_equalize_tables, _is(op, "Equalize"), (packed,), tables)
    recolored = _recolor(packed, op, factor, tables)

    coefficients = _affine_coefficients(op, sign * magnitude, *packed.shape[1:])
    is_affine = _is(op, "Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
    return _where_chosen(_affine, is_affine, (packed, coefficients), recolored)


def _is(op: jax.Array, *names: str) -> jax.Array:
    """Whether each sample's op is one of `names`."""
    return functools.reduce(jnp.logical_or, (op == OPS.index(name) for name in names))


def _where_chosen(
    function: Callable[..., jax.Array],
    chosen: jax.Array,
    operands: tuple[jax.Array, ...],
    otherwise: jax.Array,
) -> jax.Array:
    """`where(chosen, function(*operands), otherwise)` at the cost of the chosen samples alone.

    All arrays have the batch axis first. The loop takes as many chunks of samples as are needed.
    """
    batch = chosen.shape[0]
    chunk = min(_CHUNK, batch)
    count = jnp.sum(chosen, dtype=jnp.int32)
    chosen_first = jnp.argsort(~chosen, stable=True).astype(jnp.int32)

    def body(step: int, result: jax.Array) -> jax.Array:
        rank = step * chunk + jnp.arange(chunk, dtype=jnp.int32)
        # After the last chosen sample come indices past the end: their writes are dropped.
        sample = jnp.where(
            rank < count, chosen_first.at[rank].get(mode="clip"), batch + jnp.arange(chunk)
        )
        new = function(*(operand.at[sample].get(mode="clip") for operand in operands))
        return result.at[sample].set(new, mode="drop", unique_indices=True)

    return jax.lax.fori_loop(0, (count + chunk - 1) // chunk, body, otherwise)


def _pack(channels: list[jax.Array]) -> jax.Array:
    red, green, blue = channels
    return red | green << 8 | blue << 16


def _unpack(packed: jax.Array, channel: int | np.ndarray) -> jax.Array:
    """The levels of one channel; of several where `channel` is an array, by broadcasting.

    Stacking the channels one by one would make XLA store them.
    """
    return packed >> (8 * channel) & 255


def _grey(packed: jax.Array) -> jax.Array:
    red, green, blue = (_unpack(packed, channel) for channel in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _blend(degenerate: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    """`degenerate` at factor 0, `image` at factor 1, beyond it outside; levels in and out."""
    degenerate, image = degenerate.astype(jnp.float32), image.astype(jnp.float32)
    return _level(degenerate + factor * (image - degenerate))


def _level(value: jax.Array) -> jax.Array:
    """A float as Pillow stores it: clipped to 0..255 and truncated."""
    return jnp.clip(value, 0, 255).astype(jnp.uint32)


# Tables


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


def _tables(packed: jax.Array, op: jax.Array, magnitude: jax.Array, factor: jax.Array) -> jax.Array:
    """The table of every table op but Equalize, identity for all else: (B, 3, 256) uint32."""
    op, magnitude, factor = (field[:, None, None] for field in (op, magnitude, factor))
    level = jnp.arange(256, dtype=jnp.int32)

    channels = _unpack(packed[:, None], _CHANNELS[:, None, None]).astype(jnp.int32)  # (B, 3, H, W)
    low, high = (f(channels, axis=(2, 3))[..., None] for f in (jnp.min, jnp.max))  # (B, 3, 1)
    stretched = jnp.clip(255 * (level - low) // jnp.maximum(high - low, 1), 0, 255)
    stretched = jnp.where(level == high, jnp.asarray(_AUTOCONTRAST_TOP)[low, high], stretched)

    discarded_bits = 4 + (0.4 * magnitude).astype(jnp.int32)
    threshold = 256 - (25.6 * magnitude).astype(jnp.int32)
    added = (11 * magnitude).astype(jnp.int32)

    pixels = packed.shape[1] * packed.shape[2]
    total = jnp.sum(_grey(packed).astype(jnp.int32), axis=(1, 2), dtype=jnp.int32)
    mean = ((2 * total + pixels) // (2 * pixels))[:, None, None]  # int(mean + 0.5)

    table = jnp.select(
        [
            _is(op, "AutoContrast") & (high > low),
            _is(op, "Invert"),
            _is(op, "PosterizeIncreasing"),
            _is(op, "SolarizeIncreasing"),
            _is(op, "SolarizeAdd"),
            _is(op, "BrightnessIncreasing"),
            _is(op, "ContrastIncreasing"),
        ],
        [
            stretched,
            255 - level,
            level >> discarded_bits << discarded_bits,
            jnp.where(level < threshold, level, 255 - level),
            jnp.where(level < 128, jnp.minimum(level + added, 255), level),
            _blend(jnp.zeros_like(level), level, factor).astype(jnp.int32),
            _blend(mean, level, factor).astype(jnp.int32),
        ],
        default=level,
    )
    return table.astype(jnp.uint32)


def _equalize_tables(packed: jax.Array) -> jax.Array:
    """Equalize's tables (N, 3, 256) for packed images (N, H, W)."""
    channels = _unpack(packed[:, None], _CHANNELS[:, None, None])  # (N, 3, H, W)
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


# Tables and blends over pixels


def _recolor(packed: jax.Array, op: jax.Array, factor: jax.Array, tables: jax.Array) -> jax.Array:
    """Blends where `op` is a blend, and looks up `tables` (B, 3, 256) everywhere else."""
    op, factor = op[:, None, None], factor[:, None, None]
    grey = _grey(packed)
    recolored = []
    for index in range(3):
        channel = _unpack(packed, index)
        degenerate = jnp.where(_is(op, "ColorIncreasing"), grey, _smooth(channel))
        blended = _blend(degenerate, channel, factor)
        flat = channel.reshape(channel.shape[0], -1).astype(jnp.int32)
        looked_up = jnp.take_along_axis(
            tables[:, index], flat, axis=1, mode="promise_in_bounds"
        ).reshape(channel.shape)
        is_blend = _is(op, "ColorIncreasing", "SharpnessIncreasing")
        recolored.append(jnp.where(is_blend, blended, looked_up))
    return _pack(recolored)


def _smooth(channel: jax.Array) -> jax.Array:
    """3x3 mean of (B, H, W) with weight 5 on the centre, rounded; the border as it was."""
    height, width = channel.shape[1:]
    padded = jnp.pad(channel, ((0, 0), (1, 1), (1, 1)))
    shifted = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    smooth = (2 * (sum(shifted) + 4 * channel) + 13) // 26
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    inside = (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
    return jnp.where(inside, smooth, channel)


# Affine ops


def _affine_coefficients(op: jax.Array, magnitude: jax.Array, height: int, width: int) -> jax.Array:
    """(B, 6): a b c d e f with xi = a x + b y + c and yi = d x + e y + f, output to input."""
    angle = jnp.where(_is(op, "Rotate"), jnp.deg2rad(3 * magnitude), 0)
    shear_x = jnp.where(_is(op, "ShearX"), 0.03 * magnitude, 0)
    shear_y = jnp.where(_is(op, "ShearY"), 0.03 * magnitude, 0)
    shift_x = jnp.where(_is(op, "TranslateXRel"), 0.045 * magnitude * width, 0)
    shift_y = jnp.where(_is(op, "TranslateYRel"), 0.045 * magnitude * height, 0)
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


def _affine(packed: jax.Array, coefficients: jax.Array) -> jax.Array:
    """Bicubic resampling of packed images (N, H, W) through `coefficients` (N, 6)."""
    height, width = packed.shape[1:]
    a, b, c, d, e, f = (coefficients[:, index, None, None] for index in range(6))
    y, x = jnp.arange(height)[:, None] + jnp.float32(0.5), jnp.arange(width) + jnp.float32(0.5)
    input_x, input_y = a * x + b * y + c, d * x + e * y + f  # (N, H, W)
    inside = (input_x >= 0) & (input_x < width) & (input_y >= 0) & (input_y < height)

    left, top = jnp.floor(input_x - 0.5), jnp.floor(input_y - 0.5)
    right_part, lower_part = input_x - 0.5 - left, input_y - 0.5 - top
    tap = jnp.arange(-1, 3, dtype=jnp.int32)[:, None, None]
    columns = jnp.clip(left.astype(jnp.int32)[:, None] + tap, 0, width - 1)  # (N, 4, H, W)
    rows = jnp.clip(top.astype(jnp.int32)[:, None] + tap, 0, height - 1)
    places = rows[:, :, None] * width + columns[:, None]  # (N, 4 rows, 4 columns, H, W)
    flat = packed.reshape(packed.shape[0], -1)
    taps = jnp.take_along_axis(
        flat, places.reshape(flat.shape[0], -1), axis=1, mode="promise_in_bounds"
    ).reshape(places.shape)

    sampled = []
    for channel, fill in enumerate(FILL):
        levels = _unpack(taps, channel).astype(jnp.float32)
        lines = [_cubic([levels[:, row, c] for c in range(4)], right_part) for row in range(4)]
        sampled.append(jnp.where(inside, _level(_cubic(lines, lower_part)), jnp.uint32(fill)))
    return _pack(sampled)


def _cubic(taps: list[jax.Array], part: jax.Array) -> jax.Array:
    """The cubic with a = -1 through four `taps`, `part` of the way from 1 to 2.

    In this form, which is Pillow's, equal taps and `part` 0 give the tap exactly: truncation
    would turn the least deficit into a whole level.
    """
    v0, v1, v2, v3 = taps
    third = v1 - v0 + v3 - v2
    second = 2 * (v0 - v1) + v2 - v3
    return v1 + part * (v2 - v0 + part * (second + part * third))
