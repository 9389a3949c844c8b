"""Multi-head self-attention of short sequences as one Pallas TPU kernel, and its gradient.

All logits of an image and head fit in the chip, so what crosses memory is the projection (q, k and
v as it lays them out), the result, and their gradients; the softmax is computed again in the
gradient. Logits, softmax and sums are float32, products take what `qkv` is in.

Shapes: B images, N tokens, h heads of d channels, C = h*d.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def attention(qkv: jax.Array, heads: int, *, interpret: bool = False) -> jax.Array:
    """Softmax(q k^T / sqrt(d)) v, of every head.

    Args:
      qkv: (B, N, 3C) bfloat16, by head: [q, k, v] of head 0, then of head 1, ...
      heads: h.
      interpret: run it without a TPU.

    Returns:
      (B, N, C) in the dtype of `qkv`; channel h*d + i is channel i of head h.
    """
    b, n, c = qkv.shape
    return _by_image(_forward, heads, [qkv], (b, n, c // 3), interpret)


def attention_gradient(
    qkv: jax.Array, dy: jax.Array, heads: int, *, interpret: bool = False
) -> jax.Array:
    """The gradient of `attention` in qkv, where `dy` (B, N, C) is that of its result."""
    return _by_image(_gradient, heads, [qkv, dy], qkv.shape, interpret)


def _by_image(
    kernel: Callable, heads: int, maps: list[jax.Array], shape: tuple[int, ...], interpret: bool
) -> jax.Array:
    def image(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape[1:]), lambda i: (i, 0, 0))

    dtype, n, c = maps[0].dtype, shape[1], maps[0].shape[2] // 3
    return pl.pallas_call(
        partial(kernel, heads=heads),
        grid=shape[:1],
        in_specs=[image(x.shape) for x in maps],
        out_specs=image(shape),
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        cost_estimate=pl.CostEstimate(
            flops=(4 if len(maps) == 1 else 10) * shape[0] * n * n * c,
            transcendentals=shape[0] * heads * n * n,
            bytes_accessed=2 * (sum(x.size for x in maps) + shape[0] * n * shape[2]),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
    )(*maps)


def _forward(qkv: Any, y: Any, *, heads: int) -> None:
    d = y.shape[1] // heads
    for head in range(heads):
        q, k, v = _split(qkv, head, d)
        y[:, head * d : (head + 1) * d] = _product(_softmax(q, k).astype(v.dtype), v, 1, 0, v.dtype)


def _gradient(qkv: Any, dy: Any, dqkv: Any, *, heads: int) -> None:
    d = dy.shape[1] // heads
    for head in range(heads):
        q, k, v = _split(qkv, head, d)
        g = dy[:, head * d : (head + 1) * d]
        p = _softmax(q, k)
        dp = _product(g, v, 1, 1, jnp.float32)
        dlogits = p * (dp - jnp.sum(p * dp, axis=1, keepdims=True)) * d**-0.5
        dlogits = dlogits.astype(q.dtype)
        dq = _product(dlogits, k, 1, 0, q.dtype)
        dk = _product(dlogits, q, 0, 0, q.dtype)
        dv = _product(p.astype(g.dtype), g, 0, 0, q.dtype)
        for part, x in enumerate((dq, dk, dv)):
            start = (3 * head + part) * d
            dqkv[:, start : start + d] = x


def _split(qkv: Any, head: int, d: int) -> list[jax.Array]:
    return [qkv[:, start * d : (start + 1) * d] for start in range(3 * head, 3 * head + 3)]


def _softmax(q: jax.Array, k: jax.Array) -> jax.Array:
    logits = _product(q, k, 1, 1, jnp.float32) * q.shape[1] ** -0.5
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _product(a: jax.Array, b: jax.Array, i: int, j: int, dtype: Any) -> jax.Array:
    """The sum over axis i of a and j of b, in float32, given in `dtype`."""
    sums = jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)
    return sums.astype(dtype)
