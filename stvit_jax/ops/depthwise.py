"""The depthwise 3x3 convolution of STViT, with its residual: x + conv(x).

The network has it twice a block (positional encoding; inside the conv-FFN on 4C channels), always
with the residual, which therefore lives inside: one is added to the centre tap. It is written as
nine shifted multiply-adds, because libraries' depthwise convolutions are slow on CPU and, for the
weight gradient above all, on GPU.

Everything is made of plain operations, so that derivatives of any order work in both modes. Only
the derivative by x is written out: it decides what the gradient compiles to.

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
    # Padded as it is and widened after the slice: what a TPU writes down is the padded map.
    padded, wider = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), wide(x.dtype)
    shifts = [
        padded[:, dy : dy + h, dx : dx + w].astype(wider) for dy in range(3) for dx in range(3)
    ]
    products = (tap * shift for tap, shift in zip(taps, shifts, strict=True))
    return (sum(products) + bias).astype(x.dtype)


@_correlate.defjvp
def _correlate_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x, weights), (dx, dweights) = primals, tangents
    dy = _spread(dx, weights[:9]) + _correlate(x, dweights)
    return _correlate(x, weights), dy


def _spread(x: jax.Array, taps: jax.Array) -> jax.Array:
    """`_correlate` without a bias, by moving the products: its transpose is what matters.

    That pads the gradient of y once, in its own dtype, slices it and sums in that of the taps. The
    transpose of `_correlate` itself pads nine products: on CPU whatever computes the gradient of y
    is then run nine times. In forward mode alone the nine are summed in the dtype of `x`.
    """
    products = [(x.astype(taps.dtype) * tap).astype(x.dtype) for tap in taps]
    total = sum(
        jnp.pad(products[3 * dy + dx], ((0, 0), (2 - dy, dy), (2 - dx, dx), (0, 0)))
        for dy in range(3)
        for dx in range(3)
    )
    return total[:, 1:-1, 1:-1]
