"""The attention kernels in the interpreter, against plain JAX in float64.

They round what the plain form in bfloat16 rounds, weights and results, so that their error (the
root of its mean square) must be that of the plain form.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvit_jax.ops.attention_tpu import attention, attention_gradient
from stvit_jax.ops.precision import wide


def plain(qkv, heads):
    """As the network has it where there is no kernel."""
    b, n, c = qkv.shape
    q, k, v = jnp.moveaxis(qkv.reshape(b, n, heads, 3, -1), 3, 0)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide(qkv.dtype))
    weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5)
    y = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(qkv.dtype), v)
    return y.reshape(b, n, c // 3)


def error(ours, exact):
    return np.sqrt(np.mean((np.asarray(ours, np.float64) - exact) ** 2))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "shape, heads", [((1, 196, 320), 5), ((3, 49, 64), 1), ((1, 49, 96), 2), ((2, 5, 32), 4)]
)
def test_values_and_gradients_are_as_exact_as_plain_jax(shape, heads):
    rng = np.random.default_rng(0)
    b, n, c = shape
    qkv = jnp.asarray(2 * rng.normal(size=(b, n, 3 * c)), jnp.bfloat16)
    dy = jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    (exact, exact_gradient), (rounded, rounded_gradient) = (
        (y, gradient(dy.astype(dtype))[0])
        for dtype in (jnp.float64, jnp.bfloat16)
        for y, gradient in [jax.vjp(lambda x: plain(x, heads), qkv.astype(dtype))]
    )
    y = attention(qkv, heads, interpret=True)
    dqkv = attention_gradient(qkv, dy, heads, interpret=True)
    assert (y.dtype, dqkv.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert error(y, exact) < 1.05 * error(rounded, exact)
    assert error(dqkv, exact_gradient) < 1.05 * error(rounded_gradient, exact_gradient)


def test_logits_far_apart_do_not_overflow():
    """They reach 100 * 101 * 8 here: the largest weighs all."""
    qkv = jnp.zeros((1, 8, 3 * 64), jnp.bfloat16).at[..., :128].set(100)
    qkv = qkv.at[0, 3, 64:128].set(101).at[0, 3, 128:].set(1)
    np.testing.assert_array_equal(attention(qkv, 1, interpret=True), 1)
    assert jnp.all(jnp.isfinite(attention_gradient(qkv, qkv[..., :64], 1, interpret=True)))
