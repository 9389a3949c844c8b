"""The kernels for Hopper in the interpreter, which also looks for races, against plain JAX.

What ptxas makes of them is for `tests/gpu_kernels.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from stvit_jax.ops import depthwise_gpu
from stvit_jax.ops.depthwise import depthwise3x3

INTERPRET = InterpretGPUParams(detect_races=True)
ROUNDING = 2**-8  # of bfloat16, relative
# Maps of the network's sides in their narrowest block, one image, several in a group, and heights
# that are no multiple of what is loaded ahead.
MAPS = [
    (1, 2, 128, 32),
    (1, 3, 56, 32),
    (1, 5, 28, 64),
    (2, 4, 14, 64),
    (4, 2, 7, 128),
    (3, 7, 7, 256),
    (8, 1, 2, 128),
]


def numbers(shape, seed, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def reference(x, taps, bias, before):
    """In float32, but for GELU's rounding, through which the gradient passes."""
    g = x
    if before is not None:
        g = jax.nn.gelu(x + before, approximate=False)
        g = g + jax.lax.stop_gradient(g.astype(jnp.bfloat16).astype(g.dtype) - g)
    return depthwise3x3(g, taps.reshape(3, 3, 1, -1), bias, residual=False)


def assert_rounded(ours, exact):
    """One rounding apart."""
    error = np.abs(np.asarray(ours, np.float64) - np.asarray(exact, np.float64))
    assert np.all(error <= ROUNDING * (np.abs(exact) + 1e-2))


# By default a map of each kind, with the gelu that the network has; the others take minutes.
OFTEN = {(MAPS[1], True), (MAPS[2], False), (MAPS[4], True), (MAPS[6], True), (MAPS[6], False)}


@pytest.mark.parametrize(
    "shape, gelu",
    [
        pytest.param(shape, gelu, marks=() if (shape, gelu) in OFTEN else pytest.mark.slow)
        for shape in MAPS
        for gelu in (True, False)
    ],
)
def test_values_and_gradients(shape, gelu, capsys):
    c = shape[-1]
    x, dy = numbers(shape, 0), numbers(shape, 1)
    taps = 0.3 * numbers((9, c), 2, jnp.float32)
    taps = taps.at[4].add(1)
    bias = numbers((c,), 3, jnp.float32)
    before = numbers((c,), 4, jnp.float32) if gelu else None
    arguments = (x.astype(jnp.float32), taps, bias) + ((before,) if gelu else ())
    exact, pull = jax.vjp(lambda *a: reference(*a[:3], a[3] if gelu else None), *arguments)

    y = depthwise_gpu.gelu_depthwise(x, taps, bias, before, interpret=INTERPRET)
    assert y.dtype == jnp.bfloat16
    assert_rounded(y, exact)

    dx, sums = depthwise_gpu.gelu_depthwise_gradient(x, taps, before, dy, interpret=INTERPRET)
    assert sums.shape == (depthwise_gpu.groups(shape[0]), 11 if gelu else 10, c)
    expected = pull(dy.astype(jnp.float32))
    assert_rounded(dx, expected[0])
    sums = np.asarray(sums.sum(0))
    # A GELU that lies between two numbers of bfloat16 may be rounded either way.
    np.testing.assert_allclose(sums[:9], expected[1], rtol=1e-4, atol=5e-2)
    for ours, theirs in zip(sums[9:], expected[2:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert "RACE" not in capsys.readouterr().out


def test_what_has_no_cut_is_plain():
    assert depthwise_gpu.takes(56, 256) and depthwise_gpu.takes(7, 640)
    for w, c in ((7, 64), (56, 48), (300, 256)):
        assert not depthwise_gpu.takes(w, c)
    x = numbers((2, 5, 5, 48), 0)
    kernel, bias = numbers((3, 3, 1, 48), 1, jnp.float32), numbers((48,), 2, jnp.float32)
    for form in ("mosaic_gpu", "plain"):  # on a CPU: the kernel would not compile
        np.testing.assert_array_equal(
            depthwise3x3(x, kernel, bias, form=form), depthwise3x3(x, kernel, bias)
        )
    exact = x.astype(jnp.float32)
    np.testing.assert_array_equal(
        depthwise3x3(exact, kernel, bias, before=bias, form="mosaic_gpu"),
        depthwise3x3(exact, kernel, bias, before=bias),
    )
