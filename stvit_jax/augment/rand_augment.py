"""RandAugment (Cubuk et al., 2019) on the device: `rand-m9-mstd0.5-inc1`, on uint8 images.

The fifteen ops (`catalogue.py`) are three families, and a sample has at most one op a round:

- `affine.py`: one bicubic gather (Rotate, ShearX/Y, TranslateX/YRel),
- `tables.py`: one 256-entry table per channel (AutoContrast, Equalize, Invert, Posterize, Solarize,
  SolarizeAdd, Brightness, Contrast),
- `blends.py`: the image against a smoother version of itself (Color, Sharpness).

What each op computes is what Pillow computes, to the level; but for affine ops and AutoContrast,
where float32 stands for Pillow's doubles and a few pixels are a level off, and for Posterize to 0
bits, which is black, where new Pillow raises.

Tables and blends run over the whole batch in one pass, with identity parameters where another
family was drawn. The affine gather and Equalize's histogram cost far more per pixel and are needed
by one sample in six and one in thirty, so `_where_chosen` runs them on those samples alone, a few
at a time. It picks samples by index, which must not cross devices: a sharded batch goes through
`shard_map`, hence the argument `mesh`.

Shapes: B batch, N the samples of one chunk, H, W height and width.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from stvit_jax.augment import affine, blends, tables
from stvit_jax.augment.catalogue import MAX_MAGNITUDE, NO_OP, OPS, is_one_of
from stvit_jax.augment.pixels import CHANNELS, pack, unpack
from stvit_jax.errors import UserError, kind_of, one_line

_CHUNK = 16  # samples that `_where_chosen` takes at a time: enough pixels to fill a GPU


class Draws(NamedTuple):
    """What RandAugment does to each sample in each round, every field (B, num_ops)."""

    op: jax.Array  # int32, index into OPS, or NO_OP
    magnitude: jax.Array  # float32, 0..10
    sign: jax.Array  # float32, -1 or 1, ignored by ops without a sign
    factor: jax.Array  # float32, 0.1..1.9: what magnitude and sign mean to a blend


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
    """RandAugment on a batch of images; sample i depends on `key`, i and its image alone.

    Args:
      key: of this batch.
      images: uint8 (B, H, W, 3).
      magnitude: mean of the magnitudes, which are clipped to 0..10, negative in half of the draws.
      magnitude_std: their standard deviation.
      num_ops: how many ops are drawn for a sample, with replacement.
      prob: with which each is applied.
      mesh: over all of whose axes the batch is sharded, None for one device; values do not depend
        on it.

    Returns:
      Images of the same shape and type.
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
    drawn = jnp.clip(magnitude + magnitude_std * deviation, 0.0, MAX_MAGNITUDE)
    sign = jnp.where(negative < 0.5, jnp.float32(-1), jnp.float32(1))
    return Draws(jnp.where(applied < prob, op, NO_OP), drawn, sign, blends.factor_of(drawn, sign))


def apply_op(image: jax.Array, op: str, magnitude: float, negate: bool) -> jax.Array:
    """One op by its name in `OPS` on one uint8 image (H, W, 3), same shape and type out.

    Runs the code of `rand_augment` on a batch of one. `magnitude` may be a double: the factor of a
    blend is formed in double here, the other arguments in float32.

    Args:
      image: a NumPy or JAX array, of 2**24 pixels at most.
      op: one of `OPS`.
      magnitude: in 0..10.
      negate: turns the sign of ops that have one.

    Raises:
      UserError: an unknown op, no such image, or a magnitude outside 0..10.
    """
    if not isinstance(op, str) or op not in OPS:
        raise UserError(f"unknown RandAugment op {one_line(repr(op))}: use one of {', '.join(OPS)}")
    is_image = isinstance(image, np.ndarray | jax.Array) and image.dtype == np.uint8
    if not (is_image and 0 < image.size <= 3 * 2**24 and image.ndim == 3 and image.shape[2] == 3):
        raise UserError(
            f"the image is {kind_of(image)}; apply_op takes uint8 (H, W, 3) of 1 to 2**24 pixels"
        )
    magnitude = magnitude.item() if getattr(magnitude, "shape", None) == () else magnitude
    if not (isinstance(magnitude, int | float) and 0 <= magnitude <= MAX_MAGNITUDE):
        raise UserError(
            f"the magnitude is {one_line(repr(magnitude))}; it must be a number in 0..10"
        )
    sign = -1.0 if negate else 1.0
    values = (magnitude, sign, max(0.1, 1 + sign * (magnitude / 10 * 0.9)))  # in timm's order
    draws = Draws(
        jnp.full((1, 1), OPS.index(op), jnp.int32),
        *(jnp.full((1, 1), value, jnp.float32) for value in values),
    )
    return _apply_draws_jit(jnp.asarray(image)[None], draws)[0]


def apply_draws(images: jax.Array, draws: Draws) -> jax.Array:
    """Does to the uint8 images (B, H, W, 3) what `draws` says, round by round."""
    packed = pack([images[..., channel].astype(jnp.uint32) for channel in range(3)])

    def one_round(index: int, packed: jax.Array) -> jax.Array:
        return _apply_round(packed, *(field[:, index] for field in draws))

    packed = jax.lax.fori_loop(0, draws.op.shape[1], one_round, packed)
    return unpack(packed[..., None], CHANNELS).astype(jnp.uint8)


_apply_draws_jit = jax.jit(apply_draws)


def _apply_round(
    packed: jax.Array, op: jax.Array, magnitude: jax.Array, sign: jax.Array, factor: jax.Array
) -> jax.Array:
    """One op, or none, on each packed image (B, H, W); all else is (B,), as in `Draws`."""
    looked_up = tables.op_tables(packed, op, magnitude, factor)
    looked_up = _where_chosen(
        tables.equalize_tables, is_one_of(op, "Equalize"), (packed,), looked_up
    )
    recolored = blends.recolor(packed, op, factor, looked_up)

    coefficients = affine.coefficients(op, sign * magnitude, *packed.shape[1:])
    is_affine = is_one_of(op, "Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
    return _where_chosen(affine.resample, is_affine, (packed, coefficients), recolored)


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
