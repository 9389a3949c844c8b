"""Multi-head attention among all tokens: plain, or in one kernel that keeps its matrices on chip.

cuDNN has one for GPUs, and we have one for TPUs.

Shapes: B images, N tokens, h heads, d channels of a head.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stvit_jax.ops import attention_tpu
from stvit_jax.ops.partition import by_image
from stvit_jax.ops.precision import wide, wide_einsum

_TPU_TOKENS = 1024  # whose logits, in float32, fit in the chip
_LOGITS = 1024**2  # of a head: the most that are stored at once


def weights(q: jax.Array, k: jax.Array) -> jax.Array:
    """The attention of every token, softmax(q k^T / sqrt(d)).

    Args:
      q: (B, N, h, d).
      k: (B, N, h, d).

    Returns:
      (B, h, N, N), in at least float32.
    """
    logits = wide_einsum("bqhd,bkhd->bhqk", q, k)
    return jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)


def attended(attention: jax.Array, v: jax.Array) -> jax.Array:
    """What tokens take from v (B, N, h, d) by `attention` (B, h, N, N): like v."""
    return jnp.einsum("bhqk,bkhd->bqhd", attention.astype(v.dtype), v)


def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of q, k, v (B, N, h, d) each, in plain XLA: (B, N, h, d).

    Of more than 1,024 tokens the logits are never stored whole: queries come in parts, one after
    the other, and the backward pass computes each part's again.
    """
    n = q.shape[1]
    if n**2 <= _LOGITS:
        return attended(weights(q, k), v)
    parts = -(-(n**2) // _LOGITS)
    size = -(-n // parts)
    padded = jnp.pad(q, ((0, 0), (0, parts * size - n), (0, 0), (0, 0)))
    queries = jnp.moveaxis(padded.reshape(q.shape[0], parts, size, *q.shape[2:]), 1, 0)
    # Their gradients are sums over the parts: in float32, whatever the dtype.
    keys, values = (x.astype(wide(x.dtype)) for x in (k, v))

    @jax.checkpoint
    def attend(part: jax.Array) -> jax.Array:
        return attended(weights(part, keys.astype(k.dtype)), values.astype(v.dtype))

    y = jnp.moveaxis(jax.lax.map(attend, queries), 0, 1)  # (B, parts, size, h, d)
    return y.reshape(padded.shape)[:, :n]


def cudnn_takes(x: jax.Array, heads: int) -> bool:
    """Whether `cudnn` takes the projections of the tokens x (B, N, C)."""
    _, n, c = x.shape
    d = c // heads
    return x.dtype == jnp.bfloat16 and n > 1 and d % 8 == 0 and d <= 128


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """As `plain`, in one kernel of cuDNN: bfloat16, on a GPU."""
    # Its gradient takes an even number of tokens only.
    return _cudnn(q, k, v) if q.shape[1] % 2 == 0 else _cudnn_forward(q, k, v)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


@jax.custom_vjp
def _cudnn_forward(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _cudnn(q, k, v)


_cudnn_forward.defvjp(lambda q, k, v: jax.vjp(plain, q, k, v), lambda pull, dy: pull(dy))


def tpu_takes(x: jax.Array, heads: int) -> bool:
    """Whether `tpu` takes the projections of the tokens x (B, N, C)."""
    _, n, c = x.shape
    return x.dtype == jnp.bfloat16 and n <= _TPU_TOKENS and c // heads % 8 == 0


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def tpu(qkv: jax.Array, heads: int, mesh: Mesh | None = None) -> jax.Array:
    """Attention in one Pallas TPU kernel.

    Args:
      qkv: (B, N, 3C) bfloat16, by head: [q, k, v] of head 0, then of head 1, ...
      heads: h.
      mesh: of several devices that share the images.

    Returns:
      (B, N, C).
    """

    def forward(qkv: jax.Array) -> tuple[jax.Array]:
        return (attention_tpu.attention(qkv, heads),)

    return by_image(forward, (True,), mesh, qkv)[0]


def _tpu_backward(heads: int, mesh: Mesh | None, qkv: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    def gradient(qkv: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
        return (attention_tpu.attention_gradient(qkv, dy, heads),)

    return by_image(gradient, (True, True), mesh, qkv, dy)


tpu.defvjp(lambda qkv, heads, mesh: (tpu(qkv, heads, mesh), qkv), _tpu_backward)
