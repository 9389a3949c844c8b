"""LayerNorm over the channels, with its derivative written out.

Autodiff of the formula keeps float32 maps for the gradient. Here it keeps `x` alone, as it is, and
computes the rest again: one reading of x and of the gradient, one writing, float32 only between.
"""

from functools import partial

import jax
import jax.numpy as jnp

from stvit_jax.ops.precision import wide

_EPS = 1e-6


@partial(jax.checkpoint, prevent_cse=False)
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Normalises every pixel of x (..., C), then times `scale` plus `bias`, both (C,); eps 1e-6.

    Returns:
      The dtype of `x`; statistics and the affine map are in at least float32.
    """
    return _written_gradient((_normalise(x) * scale + bias).astype(x.dtype))


@jax.custom_jvp
def _written_gradient(y: jax.Array) -> jax.Array:
    """The same y, whose gradient is written in its dtype; XLA would write it in float32."""
    return y


@_written_gradient.defjvp
def _written_gradient_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return primals[0], jax.lax.optimization_barrier(tangents[0])


@jax.custom_jvp
def _normalise(x: jax.Array) -> jax.Array:
    mean, inverse = _moments(x)
    return (x.astype(mean.dtype) - mean) * inverse


@_normalise.defjvp
def _normalise_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    # Behind a barrier, so that y is made anew from x wherever it is needed; else it is written, in
    # float32, and read.
    mean, inverse = jax.lax.optimization_barrier(_moments(x))
    y = (x.astype(mean.dtype) - mean) * inverse
    # Linear in dx. Two means that do not wait for each other, also transposed, as y has mean 0.
    dx = dx.astype(mean.dtype)
    shift, slope = (jnp.mean(t, axis=-1, keepdims=True) for t in (dx, dx * y))
    return _normalise(x), inverse * (dx - shift - y * slope)


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean of every pixel and the inverse of its standard deviation, (..., 1)."""
    narrow = wide(x.dtype) != x.dtype
    x = x.astype(wide(x.dtype))
    mean = jnp.mean(x, axis=-1, keepdims=True)
    if narrow:
        # In one reading. What float32 loses to cancellation, x has lost to rounding before.
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True) - jnp.square(mean)
        variance = jnp.maximum(variance, 0)
    else:
        variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    return mean, jax.lax.rsqrt(variance + _EPS)
