"""LayerNorm with its own derivative, in both modes, against the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from stvit_jax.ops.layer_norm import layer_norm


def arguments(dtype, c=10):
    rng = np.random.default_rng(0)
    x = 3 + 2 * rng.normal(size=(2, 3, 4, c))
    scale, bias = rng.normal(size=(2, c))
    return jnp.asarray(x, dtype), jnp.asarray(scale), jnp.asarray(bias)


def formula(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-6) * scale + bias


@pytest.mark.usefixtures("x64")
def test_values_and_derivatives_in_float64():
    values = arguments(jnp.float64)
    np.testing.assert_allclose(layer_norm(*values), formula(*values), rtol=1e-13, atol=1e-13)
    tangents = arguments(jnp.float64)[::-1]
    tangents = tuple(jnp.cos(jnp.arange(v.size)).reshape(v.shape) for v in values)
    ours, theirs = (jax.jvp(f, values, tangents)[1] for f in (layer_norm, formula))
    np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-11)
    dy = tangents[0]
    for a, b in zip(*(jax.vjp(f, *values)[1](dy) for f in (layer_norm, formula)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
    check_grads(layer_norm, values, order=2, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_bfloat16_is_rounded_once():
    x, scale, bias = arguments(jnp.bfloat16, 64)
    y, back = jax.vjp(layer_norm, x, scale.astype(jnp.float32), bias.astype(jnp.float32))
    exact, exact_back = jax.vjp(formula, x.astype(jnp.float64), scale, bias)
    np.testing.assert_allclose(y.astype(jnp.float64), exact, rtol=2**-8, atol=1e-4)
    dy = jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(jnp.bfloat16)
    dx, *rest = back(dy)
    exact_dx, *exact_rest = exact_back(dy.astype(jnp.float64))
    np.testing.assert_allclose(dx.astype(jnp.float64), exact_dx, rtol=2**-8, atol=1e-4)
    for ours, theirs in zip(rest, exact_rest, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


def test_a_mean_of_many_deviations_costs_bfloat16_no_more_than_its_rounding():
    """Where the deviation is an eighth of a step of x: what is left of it is what x has of it."""
    x = jnp.asarray(100 + np.random.default_rng(0).normal(size=(1, 1, 1, 256)), jnp.bfloat16)
    ones, zeros = jnp.ones(256), jnp.zeros(256)
    exact = formula(x.astype(jnp.float32), ones, zeros)
    np.testing.assert_allclose(
        layer_norm(x, ones, zeros).astype(jnp.float32), exact, rtol=1e-2, atol=1e-2
    )
