"""Photometric distortion as mmsegmentation has it, on the device, keyed.

Brightness, contrast before or after the rest, saturation, hue: each with probability 1/2.

Levels are those of OpenCV, with uint8 between the steps: to hue, saturation and value in fixed
point, and back in float32, truncated as its vector code does. (OpenCV differs from itself by a
level there, between machines and widths of images: its scalar code rounds.)

Shapes: B batch; images of any shape behind it, RGB last.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_BRIGHTNESS = 32.0  # levels, at most, up or down
_FACTORS = (0.5, 1.5)  # of contrast and of saturation
_HUE = 18  # halves of a degree, down to -18 and up to 17
_TURN = 180  # hues


class Draws(NamedTuple):
    """What one distortion consists of; every field is (B,).

    Attributes:
      brightness: levels to add; 0: none.
      contrast: factor; 1: none.
      contrast_last: whether contrast comes after hue, not before saturation.
      saturates: whether saturation changes.
      saturation: factor.
      turns: whether hue changes.
      hue: what is added, of 180.
    """

    brightness: jax.Array
    contrast: jax.Array
    contrast_last: jax.Array
    saturates: jax.Array
    saturation: jax.Array
    turns: jax.Array
    hue: jax.Array


def photometric(key: jax.Array, images: jax.Array, rows: jax.Array | None = None) -> jax.Array:
    """Distorts every image of a batch by draws of its own.

    Args:
      key: of this batch.
      images: uint8 (B, ..., 3), RGB.
      rows: integers (B,), which determine with the key what an image's draws are: its place in the
        global batch. None: 0 to B - 1.

    Returns:
      uint8, of the same shape.
    """
    rows = jnp.arange(images.shape[0]) if rows is None else rows
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    return distort(images, jax.vmap(draw)(keys))


def draw(key: jax.Array) -> Draws:
    """The draws of one image: each of the four steps with probability 1/2, scalars."""
    uniform = jax.random.uniform(key, (9,), jnp.float32)
    brightens, contrasts, contrast_last, saturates, turns = (uniform[i] < 0.5 for i in range(5))
    low, high = _FACTORS
    contrast, saturation = (low + (high - low) * uniform[i] for i in (5, 6))
    hue = jnp.floor(2 * _HUE * uniform[7]).astype(jnp.int32) - _HUE
    return Draws(
        brightness=jnp.where(brightens, _BRIGHTNESS * (2 * uniform[8] - 1), 0),
        contrast=jnp.where(contrasts, contrast, 1),
        contrast_last=contrast_last,
        saturates=saturates,
        saturation=saturation,
        turns=turns,
        hue=hue,
    )


def distort(images: jax.Array, draws: Draws) -> jax.Array:
    """Distorts images as the draws say.

    Args:
      images: uint8 (B, ..., 3), RGB.
      draws: one for every image.

    Returns:
      uint8, of the same shape.
    """
    channels = images.ndim - 1  # of one channel of one batch

    def of_all(field: jax.Array) -> jax.Array:
        return field.reshape(-1, *(1,) * (channels - 1))

    draws = Draws(*map(of_all, draws))
    rgb = [images[..., channel].astype(jnp.int32) for channel in range(3)]
    rgb = [_level(level + draws.brightness) for level in rgb]
    first = jnp.where(draws.contrast_last, 1, draws.contrast)
    rgb = [_level(level * first) for level in rgb]

    hue, saturation, value = _hsv(*rgb)
    saturated = _rgb(hue, _level(saturation * draws.saturation), value)
    rgb = [jnp.where(draws.saturates, *pair) for pair in zip(saturated, rgb, strict=True)]

    hue, saturation, value = _hsv(*rgb)
    turned = _rgb((hue + draws.hue) % _TURN, saturation, value)
    rgb = [jnp.where(draws.turns, *pair) for pair in zip(turned, rgb, strict=True)]

    last = jnp.where(draws.contrast_last, draws.contrast, 1)
    return jnp.stack([_level(level * last) for level in rgb], axis=-1).astype(jnp.uint8)


def _level(value: jax.Array) -> jax.Array:
    """Clipped and truncated."""
    return jnp.clip(value, 0, 255).astype(jnp.int32)


def _hsv(red: jax.Array, green: jax.Array, blue: jax.Array) -> tuple[jax.Array, ...]:
    """Hue of 0 to 179, saturation and value of 0 to 255, as OpenCV has them in fixed point."""
    value = jnp.maximum(jnp.maximum(red, green), blue)
    spread = value - jnp.minimum(jnp.minimum(red, green), blue)
    saturation = (spread * _quotient(255 << 12, value) + 2048) >> 12
    angle = jnp.where(
        value == red,
        green - blue,
        jnp.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    hue = (angle * _quotient(_TURN << 12, 6 * spread) + 2048) >> 12
    return jnp.where(hue < 0, hue + _TURN, hue), saturation, value


def _quotient(top: int, bottom: jax.Array) -> jax.Array:
    """Rounded; whatever is divided by 0 is multiplied with 0 later."""
    return jnp.rint(top / jnp.maximum(bottom, 1).astype(jnp.float32)).astype(jnp.int32)


def _rgb(hue: jax.Array, saturation: jax.Array, value: jax.Array) -> list[jax.Array]:
    """Levels from hue, saturation and value, in float32, truncated."""
    sixths = hue.astype(jnp.float32) * (6 / _TURN)
    sector = jnp.floor(sixths)
    part = sixths - sector
    value = value.astype(jnp.float32) * (1 / 255)
    dull = saturation.astype(jnp.float32) * (1 / 255)
    low, falling, rising = (value * (1 - dull * share) for share in (1, part, 1 - part))
    by_sector = (
        (value, falling, low, low, rising, value),  # red
        (rising, value, value, falling, low, low),
        (low, low, rising, value, value, falling),
    )
    return [
        _level(255 * jnp.select([sector == i for i in range(5)], levels[:5], levels[5]))
        for levels in by_sector
    ]
