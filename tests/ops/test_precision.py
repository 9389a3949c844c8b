"""Products and biases of narrow maps: gradients in the dtype of parameters, in both modes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvit_jax.ops import precision
from stvit_jax.ops.precision import wide_einsum

# Of several devices.
product, plus = (partial(f, several_devices=True) for f in (precision.product, precision.plus))


def numbers(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_near(narrow, exact, tolerance=2**-7):
    narrow, exact = (np.asarray(a, np.float64) for a in (narrow, exact))
    assert np.linalg.norm(narrow - exact) <= tolerance * np.linalg.norm(exact)


@pytest.mark.parametrize(
    "function, shape", [(product, (24, 40)), (plus, (24,))], ids=["product", "plus"]
)
def test_the_gradient_of_a_parameter_is_summed_in_its_own_dtype(function, shape):
    x, weight = numbers((3, 5, 7, 24), jnp.bfloat16), numbers(shape, jnp.float32, 1)
    exact = jnp.dot if function is product else jnp.add
    y, back = jax.vjp(function, x, weight)
    assert y.dtype == jnp.bfloat16
    dy = numbers(y.shape, jnp.bfloat16, 2)
    dx, dweight = back(dy)
    assert (dx.dtype, dweight.dtype) == (jnp.bfloat16, jnp.float32)
    exact_y, exact_back = jax.vjp(exact, x.astype(jnp.float32), weight)
    exact_dx, exact_dweight = exact_back(dy.astype(jnp.float32))
    assert_near(y, exact_y)
    assert_near(dx, exact_dx)
    assert_near(dweight, exact_dweight, 1e-6)  # no rounding but that of x and dy
    dx, dweight = numbers(x.shape, x.dtype, 3), numbers(shape, jnp.float32, 4)
    _, tangent = jax.jvp(function, (x, weight), (dx, dweight))
    _, exact_tangent = jax.jvp(
        exact, (x.astype(jnp.float32), weight), (dx.astype(jnp.float32), dweight)
    )
    assert_near(tangent, exact_tangent, 2**-6)


def test_no_product_of_a_gradient_is_of_float32():
    """Which would cost a GPU its tensor cores."""
    x, kernel = numbers((8, 24), jnp.bfloat16), numbers((24, 40), jnp.float32)
    a, b = numbers((2, 6, 8), jnp.bfloat16), numbers((2, 8, 4), jnp.bfloat16)
    for function, arguments in (
        (product, (x, kernel)),
        (lambda a, b: wide_einsum("bij,bjk->bik", a, b), (a, b)),
    ):
        y, back = jax.vjp(function, *arguments)
        program = str(jax.make_jaxpr(back)(jnp.ones_like(y)))
        operands = [line for line in program.splitlines() if "dot_general" in line]
        assert operands
        program = jax.jit(back).lower(jnp.ones_like(y)).as_text()
        dots = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
        assert dots and all("f32" not in line.split("->")[0] for line in dots), dots


def test_a_wide_product_is_not_rounded():
    a, b = numbers((2, 6, 80), jnp.bfloat16), numbers((2, 80, 4), jnp.bfloat16, 1)
    y, back = jax.vjp(lambda a, b: wide_einsum("bij,bjk->bik", a, b), a, b)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, jnp.einsum("bij,bjk->bik", *map(jnp.float32, (a, b))), rtol=1e-4)
    assert {g.dtype for g in back(jnp.ones_like(y))} == {jnp.dtype(jnp.bfloat16)}


def test_one_device_keeps_all_derivatives():
    """Gradients of every example, and of gradients."""
    x, kernel = numbers((4, 3, 24), jnp.bfloat16), numbers((24, 40), jnp.float32)

    def loss(kernel, x):
        return jnp.sum(
            jnp.sin(precision.plus(precision.product(x, kernel, False), kernel[0], False))
        )

    each = jax.vmap(jax.grad(loss), (None, 0))(kernel, x)
    np.testing.assert_array_equal(each[1], jax.grad(loss)(kernel, x[1]))
    _, second = jax.jvp(jax.grad(loss), (kernel, x[0]), (kernel, x[0]))
    assert np.all(np.isfinite(second))
