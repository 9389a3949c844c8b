"""Which dtype a computation takes where the compute dtype is too narrow for it."""

import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call


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


def product(x: jax.Array, kernel: jax.Array, several_devices: bool) -> jax.Array:
    """X (..., C) times `kernel` (C, O), in the dtype of x, which may be narrower.

    On `several_devices` that share a batch, the gradient of `kernel` is in the kernel's own dtype
    from the first sum on: they add up float32, as PyTorch's data parallel training does; left
    alone, they would add up bfloat16. This has derivatives of first order, and no `vmap`.
    """
    if several_devices and x.dtype != kernel.dtype:
        return _narrow_product(x, kernel)
    return jnp.dot(x, kernel.astype(x.dtype))


@jax.custom_jvp
def _narrow_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.dot(x, kernel.astype(x.dtype))


@_narrow_product.defjvp
def _narrow_product_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (dx, dkernel) = primals, tangents

    def transpose(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jnp.einsum("...c,...o->co", x, dy, preferred_element_type=dkernel.dtype)

    by_kernel = linear_call(_narrow_product, transpose, x, dkernel)
    return _narrow_product(x, kernel), jnp.dot(dx, kernel.astype(x.dtype)) + by_kernel


def plus(y: jax.Array, bias: jax.Array, several_devices: bool) -> jax.Array:
    """Y (..., C) + `bias` (C,), in the dtype of y, which may be narrower: see `product`."""
    if several_devices and y.dtype != bias.dtype:
        return _narrow_plus(y, bias)
    return y + bias.astype(y.dtype)


@jax.custom_jvp
def _narrow_plus(y: jax.Array, bias: jax.Array) -> jax.Array:
    return y + bias.astype(y.dtype)


@_narrow_plus.defjvp
def _narrow_plus_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (y, bias), (dy, dbias) = primals, tangents

    def spread(_: None, dbias: jax.Array) -> jax.Array:
        return jnp.broadcast_to(dbias.astype(y.dtype), y.shape)

    def transpose(_: None, dy: jax.Array) -> jax.Array:
        return jnp.sum(dy, axis=tuple(range(dy.ndim - 1)), dtype=bias.dtype)

    return _narrow_plus(y, bias), dy + linear_call(spread, transpose, None, dbias)
