"""The depthwise 3x3 convolution of STViT, with its residual: x + conv(x).

The network has it twice a block (positional encoding; inside the conv-FFN on 4C channels), always
with the residual, which therefore lives inside: one is added to the centre tap. It is written as
nine shifted multiply-adds, because libraries' depthwise convolutions are slow on CPU and, for the
weight gradient above all, on GPU.

Everything is made of plain operations, so that derivatives of any order work in both modes. Only
the derivatives are written out, as what transposes well: they decide what the gradient compiles to.

Shapes: B images, H x W pixels, C channels.
"""

from functools import partial

import jax
import jax.numpy as jnp

from stvit_jax.ops.precision import wide

_CENTRE = 4  # of the nine taps in row-major order


@partial(jax.checkpoint, prevent_cse=False)  # the gradient keeps x, not its nine shifts
def residual_depthwise3x3(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """X + depthwise convolution of x with `kernel` + `bias`, padded with one zero on all sides.

    Args:
      x: (B, H, W, C).
      kernel: (3, 3, 1, C).
      bias: (C,).

    Returns:
      (B, H, W, C) in the dtype of `x`; sums are in at least float32, in the gradient too.
    """
    taps = kernel.reshape(9, -1).astype(wide(x.dtype)).at[_CENTRE].add(1)
    return _correlate(x, jnp.concatenate([taps, bias[None].astype(taps.dtype)]))


@jax.custom_jvp
def _correlate(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Nine taps on the shifts of x, and the bias; `weights` (10, C) are at least float32."""
    b, h, w, c = x.shape
    # Per image, so that the gradients of the ten are sums within an image, and so within a device,
    # before the one over images. Ten plain sums each: as one reduction with ten results they need
    # more shared memory than a GPU has, and products that are stacked first are all written out.
    weights = jnp.broadcast_to(weights[None, :, None], (b, 10, 1, c))
    *taps, bias = jnp.split(weights, 10, axis=1)  # (B, 1, 1, C) each
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(wide(x.dtype))
    shifts = [padded[:, dy : dy + h, dx : dx + w] for dy in range(3) for dx in range(3)]
    products = (tap * shift for tap, shift in zip(taps, shifts, strict=True))
    return (sum(products) + bias).astype(x.dtype)


@_correlate.defjvp
def _correlate_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x, weights), (dx, dweights) = primals, tangents
    by_weights = jax.lax.platform_dependent(x, dweights, cpu=_correlate_rows, default=_correlate)
    return _correlate(x, weights), _spread(dx, weights[:9]) + by_weights


def _spread(x: jax.Array, taps: jax.Array) -> jax.Array:
    """`_correlate` without a bias, by moving the products: its transpose is what matters.

    That pads the gradient of y once and slices it. The transpose of `_correlate` itself pads nine
    products: on CPU whatever computes the gradient of y is then run nine times.
    """
    x, dtype = x.astype(taps.dtype), x.dtype
    total = sum(
        jnp.pad(x * taps[3 * dy + dx], ((0, 0), (2 - dy, dy), (2 - dx, dx), (0, 0)))
        for dy in range(3)
        for dx in range(3)
    )
    return total.astype(dtype)[:, 1:-1, 1:-1]


@partial(jax.checkpoint, prevent_cse=False)
def _correlate_rows(x: jax.Array, weights: jax.Array) -> jax.Array:
    """`_correlate`, row by row: its transpose by the weights is what matters, on CPU.

    That multiplies and adds in one pass over x and the gradient of y, a row of all images at a
    time. The transpose of `_correlate` writes nine shifts of x out before it sums.
    """
    b, h, w, c = x.shape
    # The gradients of the ten are summed within an image first, as those of `_correlate`.
    taps = jnp.broadcast_to(weights[None, :, None], (b, 10, 1, c))
    taps = [jnp.broadcast_to(tap[:, 0], (b, w, c)) for tap in jnp.split(taps, 10, axis=1)]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    @partial(jax.checkpoint, prevent_cse=False)
    def row(y: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(padded, y, 3, axis=1).astype(wide(x.dtype))
        shifts = [rows[:, dy, dx : dx + w] for dy in range(3) for dx in range(3)]
        products = (tap * shift for tap, shift in zip(taps, shifts, strict=False))
        return sum(products) + taps[9]

    return jnp.moveaxis(jax.lax.map(row, jnp.arange(h)), 0, 1).astype(x.dtype)
