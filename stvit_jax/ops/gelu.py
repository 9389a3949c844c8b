"""The exact GELU."""

import jax
import jax.numpy as jnp

from stvit_jax.ops.precision import wide


def gelu(x: jax.Array) -> jax.Array:
    """X times the normal distribution's probability of less than x, in the dtype of `x`.

    By erf where the dtype has room for 1 + erf, as PyTorch has it: by erfc, as JAX has it, a CPU
    takes more than twice as long, and its gradient stores more. Below float32 that sum is too
    coarse for negative x.
    """
    if x.dtype != wide(x.dtype):
        return jax.nn.gelu(x, approximate=False)
    return x * (0.5 * (1 + jax.lax.erf(x * jnp.asarray(0.5, x.dtype) ** 0.5)))
