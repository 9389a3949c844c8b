"""Which dtype a computation takes where the compute dtype is too narrow for it."""

import jax
import jax.numpy as jnp


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of statistics, softmax and long sums: `dtype`, but at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def wide_einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays of one dtype, with a result in at least float32.

    Its gradient is rounded to that dtype before it is multiplied: left alone, JAX would multiply in
    float32, which costs a GPU its tensor cores, and write float32 results.
    """

    @jax.custom_jvp
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, a, b, preferred_element_type=wide(a.dtype))

    @product.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        (a, b), (da, db) = primals, tangents
        tangent = jnp.einsum(subscripts, da, b) + jnp.einsum(subscripts, a, db)
        return product(a, b), tangent.astype(wide(a.dtype))

    return product(a, b)
