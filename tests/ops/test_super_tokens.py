"""Each function against a slow loop written from the facts: values and gradients, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvit_jax.ops import super_tokens

# (height, width, cell size, iterations): interior cells, padding, several iterations, one cell.
CASES = [(12, 12, 4, 1), (13, 10, 4, 1), (9, 11, 3, 3), (7, 15, 2, 2), (3, 5, 8, 2)]

sample = jax.jit(super_tokens.sample, static_argnums=(1, 2))
spread = jax.jit(super_tokens.spread, static_argnums=(2, 3))
pytestmark = pytest.mark.usefixtures("x64")


def neighbours(y: int, x: int, hh: int, ww: int) -> list[tuple[int, int, int]]:
    """(k, row, column) of the candidates inside the grid."""
    found = []
    for k in range(9):
        row, column = y + k // 3 - 1, x + k % 3 - 1
        if 0 <= row < hh and 0 <= column < ww:
            found.append((k, row, column))
    return found


class SlowLoop:
    """One image, pixel by pixel."""

    def __init__(self, x: np.ndarray, s: int) -> None:
        h, w, c = x.shape
        self.s, self.hh, self.ww = s, -(-h // s), -(-w // s)
        self.x = np.zeros((self.hh * s, self.ww * s, c))
        self.x[:h, :w] = x

    def pixels(self):
        for i in range(self.hh * self.s):
            for j in range(self.ww * self.s):
                yield i, j, neighbours(i // self.s, j // self.s, self.hh, self.ww)

    def means(self) -> np.ndarray:
        s = self.s
        grid = [
            [self.x[y * s : y * s + s, x * s : x * s + s].mean((0, 1)) for x in range(self.ww)]
            for y in range(self.hh)
        ]
        return np.array(grid)

    def associate(self, tokens: np.ndarray) -> np.ndarray:
        q = np.zeros((*self.x.shape[:2], 9))
        for i, j, candidates in self.pixels():
            logits = np.zeros(9)
            for k, y, x in candidates:
                logits[k] = self.x[i, j] @ tokens[y, x] * self.x.shape[2] ** -0.5
            q[i, j] = np.exp(logits) / np.exp(logits).sum()
        return q

    def mass(self, q: np.ndarray) -> np.ndarray:
        mass = np.zeros((self.hh, self.ww))
        for i, j, candidates in self.pixels():
            for k, y, x in candidates:
                mass[y, x] += q[i, j, k]
        return mass

    def aggregate(self, q: np.ndarray) -> np.ndarray:
        total = np.zeros((self.hh, self.ww, self.x.shape[2]))
        for i, j, candidates in self.pixels():
            for k, y, x in candidates:
                total[y, x] += q[i, j, k] * self.x[i, j]
        return total / (self.mass(q) + 1e-12)[..., None]

    def spread(self, tokens: np.ndarray, q: np.ndarray) -> np.ndarray:
        out = np.zeros_like(self.x)
        for i, j, candidates in self.pixels():
            for k, y, x in candidates:
                out[i, j] += q[i, j, k] * tokens[y, x]
        return out

    def sample(self, n_iter: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = self.means()
        for _ in range(n_iter):
            q = self.associate(tokens)
            tokens = self.aggregate(q)
        return tokens, q


def inputs(h: int, w: int, c: int = 6) -> np.ndarray:
    return np.random.default_rng(h * 100 + w).normal(size=(2, h, w, c))


def flat(q: np.ndarray, s: int) -> jax.Array:
    """A slow loop's association (H, W, 9) in the layout (hh, ww, s*s, 9)."""
    return super_tokens.split_cells(jnp.asarray(q)[None], s)[0]


@pytest.mark.parametrize("h, w, s, n_iter", CASES)
def test_sample_and_spread_equal_the_slow_loop(h, w, s, n_iter):
    x = inputs(h, w)
    tokens, association = sample(jnp.asarray(x), s, n_iter)
    back = spread(tokens, association, h, w)
    for b in range(2):
        loop = SlowLoop(x[b], s)
        slow_tokens, q = loop.sample(n_iter)
        np.testing.assert_allclose(tokens[b], slow_tokens, rtol=0, atol=1e-12)
        np.testing.assert_allclose(association[b], flat(q, s), rtol=0, atol=1e-12)
        slow_back = loop.spread(slow_tokens, q)[:h, :w]
        np.testing.assert_allclose(back[b], slow_back, rtol=0, atol=1e-12)


@pytest.mark.parametrize("h, w, s, n_iter", CASES)
def test_gradient_flows_through_the_numerator_alone(h, w, s, n_iter):
    x = inputs(h, w)
    loop = SlowLoop(x[0], s)
    tokens, q = loop.sample(n_iter)
    weight = np.random.default_rng(1).normal(size=tokens.shape)
    gradient = jax.grad(lambda a: jnp.sum(sample(a, s, n_iter)[0][0] * weight))(jnp.asarray(x))
    # d sum(S * weight) / dX at a pixel, with the association and its sums as constants.
    slow = loop.spread(weight / (loop.mass(q) + 1e-12)[..., None], q)[:h, :w]
    np.testing.assert_allclose(gradient[0], slow, rtol=0, atol=1e-12)


@pytest.mark.parametrize("h, w, s, n_iter", CASES)
def test_gradient_of_the_way_back(h, w, s, n_iter):
    x = inputs(h, w)
    loop = SlowLoop(x[0], s)
    tokens, q = loop.sample(n_iter)
    weight = np.random.default_rng(2).normal(size=(h, w, x.shape[-1]))

    def f(t):
        return jnp.sum(spread(t[None], flat(q, s)[None], h, w)[0] * weight)

    slow = np.zeros_like(tokens)
    for i, j, candidates in loop.pixels():
        for k, y, column in candidates:
            if i < h and j < w:
                slow[y, column] += q[i, j, k] * weight[i, j]
    np.testing.assert_allclose(jax.grad(f)(jnp.asarray(tokens)), slow, rtol=0, atol=1e-12)


@pytest.mark.parametrize("h, w, s", [(12, 12, 4), (13, 10, 4), (5, 7, 3)])
def test_cells_are_cut_and_joined(h, w, s):
    x = inputs(h, w)
    cells = super_tokens.split_cells(jnp.asarray(x), s)
    loop = SlowLoop(x[0], s)
    np.testing.assert_array_equal(
        cells[0, -1, 0], loop.x[-s:, :s].reshape(s * s, -1), err_msg="padded last row of cells"
    )
    np.testing.assert_array_equal(super_tokens.join_cells(cells, h, w), x)


def test_fold_is_the_transpose_of_unfold():
    rng = np.random.default_rng(0)
    grid, parts = rng.normal(size=(1, 3, 4, 2)), rng.normal(size=(1, 3, 4, 9, 2))
    left = np.sum(np.asarray(super_tokens.unfold(jnp.asarray(grid))) * parts)
    right = np.sum(np.asarray(super_tokens.fold(jnp.asarray(parts))) * grid)
    np.testing.assert_allclose(left, right, rtol=1e-13)


def test_weight_is_lost_at_the_borders_and_only_there():
    _, association = sample(jnp.asarray(inputs(20, 20)), 4, 1)
    inside = association[:, 1:-1, 1:-1]
    np.testing.assert_allclose(inside.sum(-1), 1, atol=1e-12)
    corner = association[:, 0, 0][..., jnp.array([4, 5, 7, 8])]  # the candidates that exist there
    assert corner.sum(-1).max() < 1


def test_bfloat16_keeps_softmax_and_sums_wide():
    x = jnp.asarray(inputs(13, 10), jnp.bfloat16)
    tokens, association = sample(x, 4, 2)
    assert (tokens.dtype, association.dtype) == (jnp.bfloat16, jnp.float32)
    exact, _ = sample(x.astype(jnp.float64), 4, 2)
    np.testing.assert_allclose(tokens.astype(jnp.float64), exact, atol=2e-2)
    program = str(jax.make_jaxpr(super_tokens.sample, static_argnums=(1, 2))(x, 4, 2))
    # Logits; what candidates receive is rounded once, and then summed in float32.
    assert program.count("dot_general[") == 4
    assert program.count("preferred_element_type=float32") == 2


def test_a_cell_without_mass_has_no_token():
    """The published epsilon keeps 0 / 0 away, and counts where the mass is as small."""
    cells = jnp.full((1, 1, 1, 4, 2), 3.0)
    association = jnp.zeros((1, 1, 1, 4, 9))
    np.testing.assert_array_equal(super_tokens.aggregate(cells, association), 0)
    association = association.at[..., 4].set(1e-12 / 4)
    np.testing.assert_allclose(super_tokens.aggregate(cells, association), 1.5, rtol=1e-12)
