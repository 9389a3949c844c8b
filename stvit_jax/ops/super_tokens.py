"""Super token sampling as pure functions on arrays; no Flax.

Pixels are softly assigned to the 3x3 cells around their own, cells are averaged into super tokens
by that assignment, and tokens are spread back to pixels by the same weights (section 3.2 of arXiv
2211.11167). The published code gathers the nine candidates with identity-kernel convolutions; the
candidates are the same for all pixels of a cell, so here they are nine static slices of the padded
token grid, and everything else is a product batched over cells.

Shapes: B images, H x W pixels, C channels, s cell size, hh x ww grid of cells, p = s*s pixels of a
cell, k = 9 candidates (k = 3*dy + dx, row-major).
"""

import jax
import jax.numpy as jnp

from stvit_jax.ops.precision import wide


def split_cells(x: jax.Array, s: int) -> jax.Array:
    """Cuts a map (B, H, W, C) into cells (B, hh, ww, s*s, C), zero-padded right and bottom."""
    b, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (0, -h % s), (0, -w % s), (0, 0)))
    hh, ww = x.shape[1] // s, x.shape[2] // s
    x = x.reshape(b, hh, s, ww, s, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, hh, ww, s * s, c)


def join_cells(cells: jax.Array, height: int, width: int) -> jax.Array:
    """The inverse of `split_cells`: (B, hh, ww, s*s, C) to (B, height, width, C), padding cut."""
    b, hh, ww, p, c = cells.shape
    s = round(p**0.5)
    x = cells.reshape(b, hh, ww, s, s, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, hh * s, ww * s, c)[:, :height, :width]


def unfold(grid: jax.Array) -> jax.Array:
    """The 3x3 neighbourhood of every cell: (B, hh, ww, C) to (B, hh, ww, 9, C), zeros outside."""
    _, hh, ww, _ = grid.shape
    padded = jnp.pad(grid, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.stack(
        [padded[:, dy : dy + hh, dx : dx + ww] for dy in range(3) for dx in range(3)], axis=3
    )


def fold(parts: jax.Array) -> jax.Array:
    """The transpose of `unfold`: what nine candidates receive, (B, hh, ww, 9, C) to (B, hh, ww, C).

    What lands outside the grid is lost.
    """
    _, hh, ww, _, _ = parts.shape
    total = 0
    for k in range(9):
        # Part k of the cell at (y - dy, x - dx) belongs to the cell at (y, x).
        dy, dx = k // 3 - 1, k % 3 - 1
        pad = ((0, 0), (max(dy, 0), max(-dy, 0)), (max(dx, 0), max(-dx, 0)), (0, 0))
        shifted = jnp.pad(parts[:, :, :, k], pad)
        y, x = max(-dy, 0), max(-dx, 0)
        total = total + shifted[:, y : y + hh, x : x + ww]
    return total


def associate(cells: jax.Array, tokens: jax.Array) -> jax.Array:
    """Softmax over the nine candidates of every pixel, in at least float32.

    Candidates outside the grid are zero vectors that stay in the softmax (published behaviour), so
    at the borders the weights on real cells sum to less than 1.

    Args:
      cells: pixels, (B, hh, ww, p, C).
      tokens: super tokens, (B, hh, ww, C).

    Returns:
      The association (B, hh, ww, p, 9), float32 or float64.
    """
    scale = cells.shape[-1] ** -0.5
    logits = jnp.einsum(
        "bhwpc,bhwkc->bhwpk", cells, unfold(tokens), preferred_element_type=wide(cells.dtype)
    )
    return jax.nn.softmax(logits * scale, axis=-1)


def aggregate(cells: jax.Array, association: jax.Array) -> jax.Array:
    """Super tokens as association-weighted means of pixels.

    Args:
      cells: pixels, (B, hh, ww, p, C).
      association: (B, hh, ww, p, 9).

    Returns:
      (B, hh, ww, C), in the dtype of `cells`.
    """
    parts = jnp.einsum("bhwpk,bhwpc->bhwkc", association.astype(cells.dtype), cells)
    mass = fold(jnp.sum(association, axis=3)[..., None])  # (B, hh, ww, 1)
    parts = parts.astype(association.dtype)
    return (fold(parts) / (mass + 1e-12)).astype(cells.dtype)


def sample(x: jax.Array, s: int, n_iter: int) -> tuple[jax.Array, jax.Array]:
    """Super tokens of a map, and the association they come from.

    No gradient flows through the association (published behaviour): `x` receives gradient through
    the weighted mean alone.

    Args:
      x: (B, H, W, C); any H and W.
      s: cell size in pixels, > 1.
      n_iter: how often association and tokens are refined, >= 1.

    Returns:
      Tokens (B, hh, ww, C) in the dtype of `x`, association (B, hh, ww, s*s, 9) in at least
      float32.
    """
    cells = split_cells(x, s)
    constant = jax.lax.stop_gradient(cells)
    tokens = jnp.mean(constant, axis=3, dtype=wide(x.dtype)).astype(x.dtype)
    for _ in range(n_iter - 1):
        tokens = aggregate(constant, associate(constant, tokens))
    association = associate(constant, tokens)
    return aggregate(cells, association), association


def spread(tokens: jax.Array, association: jax.Array, height: int, width: int) -> jax.Array:
    """Back to pixels: every pixel is the association-weighted sum of its nine candidates.

    Args:
      tokens: (B, hh, ww, C).
      association: (B, hh, ww, s*s, 9).
      height: pixels of the map, without padding.
      width: likewise.

    Returns:
      (B, height, width, C) in the dtype of `tokens`.
    """
    pixels = jnp.einsum("bhwpk,bhwkc->bhwpc", association.astype(tokens.dtype), unfold(tokens))
    return join_cells(pixels, height, width)
