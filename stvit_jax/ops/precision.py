"""Which dtype a computation takes where the compute dtype is too narrow for it."""

import jax.numpy as jnp


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of statistics, softmax and long sums: `dtype`, but at least float32."""
    return jnp.promote_types(dtype, jnp.float32)
