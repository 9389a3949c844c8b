"""The depthwise 3x3 convolution of STViT, with its residual: x + conv(x).

The network has it twice a block (positional encoding; inside the conv-FFN on 4C channels), always
with the residual, which therefore lives inside: one is added to the centre tap. It is written as
nine shifted multiply-adds, because libraries' depthwise convolutions are slow on CPU and, for the
weight gradient above all, on GPU. The gradient is written out, so that the weight gradient is one
fused reduction with several results, and nothing but `x` is kept for it.
"""

import jax
import jax.numpy as jnp

from stvit_jax.ops.precision import wide


@jax.custom_vjp
def residual_depthwise3x3(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """x + depthwise convolution of x with `kernel` + `bias`, padded with one zero on all sides.

    Args:
      x: (B, H, W, C).
      kernel: (3, 3, 1, C).
      bias: (C,).

    Returns:
      (B, H, W, C) in the dtype of `x`; sums are in at least float32.
    """
    return (_correlate(x, _with_identity(kernel, x.dtype)) + bias).astype(x.dtype)


def _forward(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, tuple]:
    return residual_depthwise3x3(x, kernel, bias), (x, kernel, bias)


def _backward(saved: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, kernel, bias = saved
    dx = _correlate(dy, _with_identity(kernel, x.dtype)[::-1, ::-1]).astype(x.dtype)
    dy = dy.astype(wide(dy.dtype))
    # One reduction with ten results reads x and dy once; ten reductions take five times as long.
    # It stays within an image, and so within a device; the sum over images is the one all-reduce.
    terms = (*(tap * dy for tap in _shifts(x)), dy)
    zeros = (jnp.zeros((), dy.dtype),) * len(terms)
    sums = jax.lax.reduce(terms, zeros, lambda a, b: tuple(map(jnp.add, a, b)), (1, 2))
    *taps, dbias = jnp.sum(jnp.stack(sums), axis=1)
    dkernel = jnp.stack(taps).reshape(kernel.shape)
    return dx, dkernel.astype(kernel.dtype), dbias.astype(bias.dtype)


residual_depthwise3x3.defvjp(_forward, _backward)


def _with_identity(kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """(3, 3, C) taps in at least float32, with one added at the centre."""
    return jnp.asarray(kernel[:, :, 0], wide(dtype)).at[1, 1].add(1)


def _shifts(x: jax.Array) -> list[jax.Array]:
    """The nine shifted views of `x` that meet the taps in row-major order, at least float32."""
    _, h, w, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(wide(x.dtype))
    return [padded[:, dy : dy + h, dx : dx + w] for dy in range(3) for dx in range(3)]


def _correlate(x: jax.Array, taps: jax.Array) -> jax.Array:
    taps = taps.reshape(9, -1)
    return sum(tap * taps[k] for k, tap in enumerate(_shifts(x)))
