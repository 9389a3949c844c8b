"""The Pallas TPU kernels in the interpreter, against plain JAX in float32.

Results are rounded once, to bfloat16: to one part in 2**8 they are those of float32. Gradients of
taps and bias are sums in float32, and differ by the order of their terms.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvit_jax.ops.depthwise_tpu import gelu_depthwise, gelu_depthwise_gradient

SHAPES = [
    (1, 7, 7, 96),  # one image: whole rows of channels that fill no register
    (2, 5, 14, 320),
    (16, 7, 3, 128),
    (32, 4, 28, 256),  # two blocks of lanes
    (48, 2, 96, 128),  # blocks of some of the images
    (128, 3, 4, 96),  # images on the lanes
    (128, 1, 1, 320),  # nothing but borders
    (256, 2, 3, 64),
    # blocks of some of the channels
    pytest.param((128, 2, 48, 192), marks=pytest.mark.slow),
]


def reference(x, taps, bias, gelu):
    _, h, w, _ = x.shape
    x = jax.nn.gelu(x, approximate=False) if gelu else x
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [padded[:, dy : dy + h, dx : dx + w] for dy in range(3) for dx in range(3)]
    return sum(map(jnp.multiply, taps, shifts)) + bias


def arguments(shape):
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(2 * rng.normal(size=shape), jnp.bfloat16) for _ in range(2))
    taps, bias = (jnp.asarray(rng.normal(size=(*n, shape[-1])), jnp.float32) for n in ((9,), ()))
    return x, taps, bias, dy


def assert_rounded(narrow, exact):
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), exact, rtol=2**-8, atol=2e-5)


@pytest.mark.parametrize("gelu", [True, pytest.param(False, marks=pytest.mark.docs)])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_plain_jax(shape, gelu):
    x, taps, bias, dy = arguments(shape)
    y = gelu_depthwise(x, taps, bias, gelu=gelu, interpret=True)
    exact, gradient = jax.vjp(
        lambda *args: reference(*args, gelu), x.astype(jnp.float32), taps, bias
    )
    assert_rounded(y, exact)
    dx, sums = gelu_depthwise_gradient(x, taps, dy, gelu=gelu, interpret=True)
    exact_dx, exact_taps, exact_bias = gradient(dy.astype(jnp.float32))
    assert_rounded(dx, exact_dx)
    assert sums.dtype == jnp.float32
    exact_sums = jnp.concatenate([exact_taps, exact_bias[None]])
    np.testing.assert_allclose(sums, exact_sums, rtol=1e-5, atol=1e-5 * jnp.max(abs(exact_sums)))


@pytest.mark.parametrize("value", [-40.0, -6.0, -0.0, 6.0, 40.0])
def test_tails_of_gelu(value):
    x, taps, bias, dy = arguments((1, 3, 3, 8))
    x = jnp.full_like(x, value)
    exact, gradient = jax.vjp(lambda x: reference(x, taps, bias, gelu=True), x.astype(jnp.float32))
    assert_rounded(gelu_depthwise(x, taps, bias, gelu=True, interpret=True), exact)
    dx, _ = gelu_depthwise_gradient(x, taps, dy, gelu=True, interpret=True)
    assert_rounded(dx, gradient(dy.astype(jnp.float32))[0])
