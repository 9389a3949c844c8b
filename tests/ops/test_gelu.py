"""The exact GELU against Python's own erf."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from stvit_jax.ops.gelu import gelu

X = np.linspace(-12, 12, 4801)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float64, 1e-14), (jnp.float32, 1e-6)])
def test_values_and_gradients_are_exact(dtype, atol):
    cdf = np.array([math.erfc(-x / math.sqrt(2)) / 2 for x in X])
    slope = cdf + X * np.exp(-(X**2) / 2) / math.sqrt(2 * math.pi)
    y, grads = jax.vmap(jax.value_and_grad(gelu))(jnp.asarray(X, dtype))
    assert y.dtype == grads.dtype == dtype
    np.testing.assert_allclose(y, X * cdf, rtol=2e-7 if dtype == jnp.float32 else 0, atol=atol)
    np.testing.assert_allclose(grads, slope, rtol=0, atol=atol)


@pytest.mark.usefixtures("x64")
def test_derivatives_in_both_modes_equal_differences():
    check_grads(gelu, (jnp.asarray(X[::300]),), order=2, rtol=1e-6, atol=1e-6)


def test_bfloat16_keeps_what_is_near_zero():
    """1 + erf in bfloat16 would be wrong by 3e-3 at x = -3."""
    x = jnp.asarray(X, jnp.bfloat16)
    exact = gelu(x.astype(jnp.float32))
    np.testing.assert_allclose(gelu(x).astype(jnp.float32), exact, rtol=2**-8, atol=2e-3)
