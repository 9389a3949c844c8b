"""What an association says of pixels and super tokens, as maps to look at.

Shapes as in `super_tokens`; here of one image, so without B. A token has the number y * ww + x.
"""

import jax
import jax.numpy as jnp

from stvit_jax.ops import super_tokens


def hard(association: jax.Array, height: int, width: int) -> jax.Array:
    """The number of the super token that every pixel belongs to most.

    Candidates outside the grid are no tokens, and no pixel is given to them.

    Args:
      association: (hh, ww, s*s, 9).
      height: pixels of the map, without padding.
      width: likewise.

    Returns:
      Integers (height, width).
    """
    numbers = _candidates(association)[:, :, None]  # (hh, ww, 1, 9)
    best = jnp.argmax(jnp.where(numbers >= 0, association, -1), axis=-1, keepdims=True)
    cells = jnp.take_along_axis(jnp.broadcast_to(numbers, association.shape), best, axis=-1)
    return super_tokens.join_cells(cells[None], height, width)[0, :, :, 0]


def memberships(association: jax.Array, tokens: jax.Array, height: int, width: int) -> jax.Array:
    """How much every pixel belongs to some super tokens: columns of Q.

    Args:
      association: (hh, ww, s*s, 9).
      tokens: their numbers, (K,).
      height: pixels of the map, without padding.
      width: likewise.

    Returns:
      (K, height, width), in 0 to 1.
    """
    hh, ww = association.shape[:2]
    chosen = jax.nn.one_hot(tokens, hh * ww, axis=0, dtype=association.dtype)
    maps = super_tokens.spread(chosen.reshape(1, hh, ww, -1), association[None], height, width)
    return maps[0].transpose(2, 0, 1)


def row(association: jax.Array, y: int, x: int) -> jax.Array:
    """How much one pixel belongs to every super token: a row of Q, (hh*ww,)."""
    hh, ww, p, _ = association.shape
    s = round(p**0.5)
    numbers = _candidates(association)[y // s, x // s]
    weights = association[y // s, x // s, (y % s) * s + x % s]
    # What lies outside the grid is added to a place that is cut off.
    return jnp.zeros(hh * ww + 1, association.dtype).at[numbers].add(weights)[:-1]


def attention_of(
    association: jax.Array, attention: jax.Array, at: tuple[int, int], height: int, width: int
) -> jax.Array:
    """The weights with which the values of all pixels enter the result of one: a row of Q A Q^T.

    The columns of the second Q sum to one, as where super tokens are means of pixels.

    Args:
      association: Q, (hh, ww, s*s, 9).
      attention: A, of super tokens, (heads, hh*ww, hh*ww).
      at: y and x of the pixel.
      height: pixels of the map, without padding.
      width: likewise.

    Returns:
      (heads, height, width).
    """
    hh, ww = association.shape[:2]
    tokens = jnp.einsum("t,htu->uh", row(association, *at), attention)
    mass = super_tokens.fold(jnp.sum(association, axis=2)[None, ..., None]) + 1e-12
    maps = super_tokens.spread(
        tokens.reshape(1, hh, ww, -1) / mass, association[None], height, width
    )
    return maps[0].transpose(2, 0, 1)


def _candidates(association: jax.Array) -> jax.Array:
    """The numbers of the nine tokens around every cell, (hh, ww, 9); -1 where there is none."""
    hh, ww = association.shape[:2]
    numbers = 1 + jnp.arange(hh * ww).reshape(1, hh, ww, 1)
    return super_tokens.unfold(numbers)[0, ..., 0] - 1
