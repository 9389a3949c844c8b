"""Attention in plain XLA against the formula, and what kernels take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvit_jax.ops import attention


def numbers(dtype, n=9, h=2, d=8):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(3, n, h, d)), dtype) for _ in range(3)]


def formula(q, k, v):
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1), v)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float64, 1e-13), (jnp.bfloat16, 2e-2)])
def test_values_and_gradients(dtype, tolerance):
    values = numbers(dtype)
    exact, exact_back = jax.vjp(formula, *(v.astype(jnp.float64) for v in values))
    y, back = jax.vjp(attention.plain, *values)
    dy = jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(dtype)
    pairs = [(y, exact), *zip(back(dy), exact_back(dy.astype(jnp.float64)), strict=True)]
    for ours, theirs in pairs:
        assert ours.dtype == dtype
        error = np.linalg.norm(np.asarray(ours, np.float64) - theirs)
        assert error <= tolerance * np.linalg.norm(theirs)
    weights = attention.weights(*values[:2])
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(attention.attended(weights, values[2]), y)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float64, 1e-12), (jnp.bfloat16, 2e-2)])
def test_many_tokens_are_attended_to_in_parts(dtype, tolerance, monkeypatch):
    """The same values and gradients, and no array of all logits, in either direction."""
    monkeypatch.setattr(attention, "_LOGITS", 100)  # of 23 tokens: parts of 4, the last padded
    n, values = 23, numbers(dtype, n=23)
    exact, exact_back = jax.vjp(formula, *(v.astype(jnp.float64) for v in values))

    def both(values, dy):
        y, back = jax.vjp(attention.plain, *values)
        return [y, *back(dy)]

    dy = jnp.cos(jnp.arange(exact.size)).reshape(exact.shape).astype(dtype)
    expected = [exact, *exact_back(dy.astype(jnp.float64))]
    for ours, theirs in zip(jax.jit(both)(values, dy), expected, strict=True):
        assert ours.dtype == dtype
        error = np.linalg.norm(np.asarray(ours, np.float64) - theirs)
        assert error <= tolerance * np.linalg.norm(theirs)
    assert f"{n},{n}]" not in str(jax.make_jaxpr(both)(values, dy))
    assert f"{n},{n}]" in str(jax.make_jaxpr(formula)(*values))


def test_what_kernels_take():
    """Heads of whole registers; on a TPU as many tokens as fit in the chip."""
    for takes in (attention.cudnn_takes, attention.tpu_takes):
        assert takes(jnp.zeros((2, 1024, 96), jnp.bfloat16), 2)
        assert not takes(jnp.zeros((2, 9, 96), jnp.bfloat16), 8)
        assert not takes(jnp.zeros((2, 9, 96), jnp.float32), 2)
    assert not attention.tpu_takes(jnp.zeros((2, 1025, 96), jnp.bfloat16), 2)
    assert not attention.cudnn_takes(jnp.zeros((2, 1, 96), jnp.bfloat16), 2)
    assert not attention.cudnn_takes(jnp.zeros((2, 9, 144), jnp.bfloat16), 1)
