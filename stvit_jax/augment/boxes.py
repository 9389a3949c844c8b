"""Axis-aligned boxes within images, one an image or a group, and their integer draws."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


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


def uniform_integer(uniform: jax.Array, count: jax.Array | int) -> jax.Array:
    """An int32 in 0..`count` - 1 from a float32 in [0, 1)."""
    return jnp.floor(uniform * count).astype(jnp.int32)
