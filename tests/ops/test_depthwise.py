"""The depthwise convolution against XLA's own, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvit_jax.ops.depthwise import residual_depthwise3x3


def reference(x, kernel, bias):
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
    return x + y + bias


def arguments(h, w, dtype):
    rng = np.random.default_rng(0)
    shapes = ((2, h, w, 5), (3, 3, 1, 5), (5,))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("h, w", [(6, 7), (1, 1), (2, 9)])
def test_values_and_gradients_equal_the_library(h, w):
    args = arguments(h, w, jnp.float64)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=args[0].shape))
    ours, theirs = (
        jax.value_and_grad(lambda *a, f=f: jnp.sum(f(*a) * weight), argnums=(0, 1, 2))(*args)
        for f in (residual_depthwise3x3, reference)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), ours, theirs)


def test_bfloat16_in_and_out_with_sums_in_float32():
    x, kernel, bias = arguments(8, 8, jnp.float32)
    x = x.astype(jnp.bfloat16)
    y, back = jax.vjp(residual_depthwise3x3, x, kernel, bias)
    dx, dkernel, dbias = back(jnp.ones_like(y))
    assert [a.dtype for a in (y, dx, dkernel, dbias)] == ["bfloat16"] * 2 + ["float32"] * 2
    exact = reference(x.astype(jnp.float32), kernel, bias)
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))  # one rounding, at the end
