"""Maps of an association against slow loops, at borders and where cells do not divide the map."""

import numpy as np
import pytest

from stvit_jax.ops import association as maps
from stvit_jax.ops import attention, super_tokens

pytestmark = pytest.mark.usefixtures("x64")
SIZES = [(7, 10, 4), (5, 6, 2), (4, 4, 4)]  # height, width, cell


def dense(association: np.ndarray, height: int, width: int) -> np.ndarray:
    """Q, pixel by pixel: (height, width, hh, ww)."""
    hh, ww, p, _ = association.shape
    s = round(p**0.5)
    q = np.zeros((height, width, hh, ww))
    for y in range(height):
        for x in range(width):
            for k in range(9):
                gy, gx = y // s + k // 3 - 1, x // s + k % 3 - 1
                if 0 <= gy < hh and 0 <= gx < ww:
                    pixel = (y % s) * s + x % s
                    q[y, x, gy, gx] = association[y // s, x // s, pixel, k]
    return q


@pytest.fixture(params=SIZES, ids=str)
def sampled(request):
    """A map (1, H, W, C), its super tokens and association."""
    height, width, s = request.param
    x = np.random.default_rng(0).normal(size=(1, height, width, 6)) * 2
    return x, *super_tokens.sample(x, s, 2)


def test_every_pixel_belongs_to_its_heaviest_token(sampled) -> None:
    x, _, association = sampled
    _, height, width, _ = x.shape
    q = dense(np.asarray(association[0]), height, width)
    expected = q.reshape(height, width, -1).argmax(-1)
    np.testing.assert_array_equal(maps.hard(association[0], height, width), expected)


def test_rows_and_columns_are_those_of_the_matrix(sampled) -> None:
    x, tokens, association = sampled
    _, height, width, _ = x.shape
    count = tokens.shape[1] * tokens.shape[2]
    q = dense(np.asarray(association[0]), height, width).reshape(height, width, -1)
    columns = maps.memberships(association[0], np.arange(count), height, width)
    np.testing.assert_allclose(columns, q.transpose(2, 0, 1), rtol=0, atol=1e-15)
    for y, x in ((0, 0), (height - 1, width - 1), (height // 2, width // 2)):
        np.testing.assert_allclose(maps.row(association[0], y, x), q[y, x], rtol=0, atol=1e-15)


def test_attention_of_a_pixel_gives_what_the_network_computes(sampled) -> None:
    """Weights over pixels, times the pixels, are the spread result of attention among tokens."""
    x, tokens, association = sampled
    _, height, width, c = x.shape
    flat = tokens.reshape(1, -1, 1, c)
    weights = attention.weights(flat, flat)  # (1, 1, N, N)
    attended = attention.attended(weights, flat).reshape(tokens.shape)
    expected = super_tokens.spread(attended, association, height, width)[0]
    padded = super_tokens.split_cells(x, round(association.shape[3] ** 0.5))
    hh, ww, s = *tokens.shape[1:3], round(association.shape[3] ** 0.5)
    pixels = np.asarray(super_tokens.join_cells(padded, hh * s, ww * s))[
        0
    ]  # zeros have weight, too
    for at in ((0, 0), (height - 1, width - 1), (height // 2, width // 3)):
        own = maps.attention_of(association[0], weights[0], at, hh * s, ww * s)
        assert own.shape == (1, hh * s, ww * s)
        np.testing.assert_allclose(
            np.einsum("hw,hwc->c", own[0], pixels), expected[at], rtol=0, atol=1e-12
        )
        total = float(np.sum(maps.row(association[0], *at)))
        np.testing.assert_allclose(np.sum(own), total, rtol=0, atol=1e-10)
        cut = maps.attention_of(association[0], weights[0], at, height, width)
        np.testing.assert_array_equal(cut, own[:, :height, :width])
