"""Resizing and pooling against PyTorch, over many odd sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stvit_jax.ops import resize

SIZES = [  # from, to: grown by whole and other numbers, shrunk, both, one pixel
    ((7, 5), (14, 15)),
    ((4, 3), (16, 24)),
    ((1, 1), (6, 4)),
    ((2, 3), (13, 10)),
    ((13, 10), (26, 20)),
    ((22, 17), (43, 33)),
    ((9, 8), (3, 4)),
    ((11, 6), (5, 13)),
    ((6, 6), (1, 1)),
    ((5, 12), (5, 31)),
    ((33, 1), (17, 2)),
]


def numbers(size, dtype=np.float64, channels=3):
    return np.random.default_rng(0).normal(size=(2, *size, channels)).astype(dtype)


def theirs(function, x):
    """What PyTorch makes of (B, H, W, C), and its gradient from an output of cosines."""
    x = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    y = function(x)
    dy = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.permute(0, 2, 3, 1).shape)
    y.backward(dy.permute(0, 3, 1, 2))
    return [a.detach().permute(0, 2, 3, 1).numpy() for a in (y, x.grad)]


def ours(function, x):
    @jax.jit
    def both(x):
        y, back = jax.vjp(function, x)
        dy = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        return [y, back(dy)[0]]

    return both(x)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("before, after", SIZES)
def test_bilinear(before, after):
    x = numbers(before)
    expected = theirs(lambda x: F.interpolate(x, after, mode="bilinear", align_corners=False), x)
    for a, b in zip(ours(lambda x: resize.bilinear(x, after), x), expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("bins", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(16, 16), (4, 3), (7, 13), (6, 12)])
def test_adaptive_average_pool(size, bins):
    x = numbers(size)
    expected = theirs(lambda x: F.adaptive_avg_pool2d(x, bins), x)
    pooled = ours(lambda x: resize.adaptive_average_pool(x, bins), x)
    for a, b in zip(pooled, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("before, after", SIZES)
def test_nearest(before, after):
    x = numbers(before, np.float32)
    y, gradient = theirs(lambda x: F.interpolate(x, after, mode="nearest"), x)
    our_y, our_gradient = ours(lambda x: resize.nearest(x, after), x)
    np.testing.assert_array_equal(our_y, y)
    np.testing.assert_allclose(our_gradient, gradient, rtol=0, atol=1e-4)


def test_nearest_takes_pytorchs_pixel_at_every_ratio():
    """At 2 % of the ratios float32 decides otherwise than whole numbers would."""
    sizes = [(n_in, n_out) for n_in in (1, 7, 22, 47, 58) for n_out in range(1, 120, 2)]
    sizes += [(2, 82), (2, 94), (2, 110)]
    maps = [np.arange(n_in, dtype=np.float32).reshape(1, n_in, 1, 1) for n_in, _ in sizes]

    @jax.jit
    def taken(maps):
        return [resize.nearest(x, (n, 1)) for x, (_, n) in zip(maps, sizes, strict=True)]

    rounded = 0
    for x, y, (n_in, n_out) in zip(maps, taken(maps), sizes, strict=True):
        expected = F.interpolate(torch.from_numpy(x[:, None, :, 0, 0]), n_out, mode="nearest")
        np.testing.assert_array_equal(np.ravel(y), np.ravel(expected), f"{n_in} to {n_out}")
        rounded += not np.array_equal(np.ravel(y), np.arange(n_out) * n_in // n_out)
    assert rounded > 0


@pytest.mark.parametrize("after", [(28, 20), (23, 9)])
def test_bfloat16_is_rounded_once(after):
    x = jnp.asarray(numbers((7, 5), np.float32), jnp.bfloat16)
    exact = resize.bilinear(x.astype(jnp.float32), after)
    y = resize.bilinear(x, after)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_every_map_has_its_own_size():
    x = numbers((9, 7))
    sizes, size = np.array([[13, 4], [18, 11]]), (20, 16)
    with jax.enable_x64(True):
        together = jax.jit(lambda x, s: resize.bilinear_each(x, s, size))(x, sizes)
        for i, (height, width) in enumerate(sizes):
            alone = resize.bilinear(jnp.asarray(x[i : i + 1]), (height, width))
            np.testing.assert_allclose(together[i, :height, :width], alone[0], rtol=0, atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_a_row_by_itself_is_that_row():
    size = (20, 4)
    x = np.random.default_rng(0).normal(size=(7, 9, 3))
    whole = resize.bilinear_each(jnp.asarray(x)[None], jnp.array([size]), size)[0]
    width = size[1] + 3
    row = jax.jit(lambda row, size: resize.bilinear_row(jnp.asarray(x), row, size, width))
    for i in (0, size[0] // 2, size[0] - 1):
        ours = row(i, jnp.array(size))
        assert ours.shape == (width, 3)
        np.testing.assert_allclose(ours[: size[1]], whole[i], rtol=0, atol=1e-14)
