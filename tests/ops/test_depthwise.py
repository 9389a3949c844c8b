"""The depthwise convolution against XLA's own, values and gradients."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from stvit_jax.ops.depthwise import depthwise3x3

ROOT = Path(__file__).parents[2]


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
        for f in (depthwise3x3, reference)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), ours, theirs)


@pytest.mark.usefixtures("x64")
def test_derivatives_of_every_order_and_mode_equal_differences():
    """Second order in both modes: Hessian-vector products either way round are among them."""
    check_grads(depthwise3x3, arguments(3, 2, jnp.float64), order=2, rtol=1e-6, atol=1e-6)


def test_bfloat16_in_and_out_with_sums_in_float32():
    x, kernel, bias = arguments(8, 8, jnp.float32)
    x = x.astype(jnp.bfloat16)
    y, back = jax.vjp(depthwise3x3, x, kernel, bias)
    dx, dkernel, dbias = back(jnp.ones_like(y))
    assert [a.dtype for a in (y, dx, dkernel, dbias)] == ["bfloat16"] * 2 + ["float32"] * 2
    exact = reference(x.astype(jnp.float32), kernel, bias)
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))  # one rounding, at the end


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_residual_may_lie_in_the_centre_tap(dtype):
    x, kernel, bias = arguments(6, 7, jnp.float32)
    x = x.astype(dtype)
    y = depthwise3x3(x, kernel.at[1, 1].add(1), bias, residual=False)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, depthwise3x3(x, kernel, bias))


def test_gradient_of_a_sharded_batch_needs_one_sum_over_devices():
    program = """
import re, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from stvit_jax.ops.depthwise import depthwise3x3
mesh = Mesh(np.array(jax.devices()), ("data",))
split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
def gradients(x, kernel, bias, dy):
    return jax.vjp(depthwise3x3, x, kernel, bias)[1](dy)
args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((16, 4, 4, 5), (3, 3, 1, 5), (5,))]
compiled = jax.jit(
    gradients, in_shardings=(split, whole, whole, split), out_shardings=(split, whole, whole)
).lower(*args, args[0]).compile()
print(len(jax.devices()))
print(compiled.as_text())
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert result.stdout.startswith("8\n")
    pattern = r"= (.*) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\("
    found = re.findall(pattern, result.stdout)
    assert [kind for _, kind in found] == ["all-reduce"]
    assert found[0][0].startswith("f32[10,5]")  # nine taps and the bias
