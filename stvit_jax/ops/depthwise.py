"""The depthwise 3x3 convolution of STViT, with its residual: x + conv(x).

The network has it twice a block (positional encoding; after the GELU of the conv-FFN, on 4C
channels), always with the residual, which therefore lives inside: one is added to the centre tap.
The plain form is nine shifted multiply-adds, because libraries' depthwise convolutions are slow on
CPU and, for the weight gradient above all, on GPU. In bfloat16 a device may have a kernel instead.

The plain form is made of plain operations, so that derivatives of any order work in both modes.
Only the derivatives are written out, as what transposes well: they decide what the gradient
compiles to. Kernels have a gradient, and no more.

Shapes: B images, H x W pixels, C channels.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stvit_jax.ops import depthwise_gpu, depthwise_tpu
from stvit_jax.ops.gelu import gelu
from stvit_jax.ops.partition import by_image
from stvit_jax.ops.precision import wide

_CENTRE = 4  # of the nine taps in row-major order
_TPU_IMAGES = 16  # of a device: so many, a multiple, or fewer


def depthwise3x3(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    residual: bool = True,
    before: jax.Array | None = None,
    form: str = "plain",
    mesh: Mesh | None = None,
) -> jax.Array:
    """G + depthwise convolution of g with `kernel` + `bias`, padded with one zero on all sides.

    Args:
      x: (B, H, W, C).
      kernel: (3, 3, 1, C).
      bias: (C,).
      residual: whether g itself is added; else the kernel's centre holds the one.
      before: (C,): g is GELU(x + before); None: g is x.
      form: as in `Kernels.depthwise`; where a kernel does not take x, the plain one is used.
      mesh: of several devices that share the images.

    Returns:
      (B, H, W, C) in the dtype of `x`; sums are in at least float32, in the gradient too.
    """
    taps = jnp.asarray(kernel, wide(x.dtype)).reshape(9, -1)
    if residual:
        taps = taps.at[_CENTRE].add(1)
    if has_kernel(form, x, mesh):
        weights = (w if w is None else jnp.asarray(w, taps.dtype) for w in (bias, before))
        return _by_kernel(x, taps, *weights, form, mesh)
    if before is not None:
        x = gelu(x + before.astype(x.dtype))
    return _plain(x, taps, bias)


def has_kernel(form: str, x: jax.Array, mesh: Mesh | None) -> bool:
    """Whether the kernel of a form takes the share of a device of x (B, H, W, C)."""
    if x.dtype != jnp.bfloat16:
        return False
    b, _, w, c = x.shape
    if form == "pallas_tpu":
        share = b // (mesh.size if mesh else 1)
        return share <= _TPU_IMAGES or share % _TPU_IMAGES == 0
    return form == "mosaic_gpu" and depthwise_gpu.takes(w, c)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _by_kernel(
    x: jax.Array,
    taps: jax.Array,
    bias: jax.Array,
    before: jax.Array | None,
    form: str,
    mesh: Mesh | None,
) -> jax.Array:
    def forward(
        x: jax.Array, taps: jax.Array, bias: jax.Array, *before: jax.Array
    ) -> tuple[jax.Array]:
        if form == "mosaic_gpu":
            return (depthwise_gpu.gelu_depthwise(x, taps, bias, *before or [None]),)
        x = x + before[0].astype(x.dtype) if before else x
        return (depthwise_tpu.gelu_depthwise(x, taps, bias, gelu=bool(before)),)

    weights = [taps, bias] if before is None else [taps, bias, before]
    return by_image(forward, (True, *[False] * len(weights)), mesh, x, *weights)[0]


def _by_kernel_backward(form: str, mesh: Mesh | None, kept: tuple, dy: jax.Array) -> tuple:
    x, taps, before = kept

    def backward(
        x: jax.Array, dy: jax.Array, taps: jax.Array, *before: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        if form == "mosaic_gpu":
            dx, sums = depthwise_gpu.gelu_depthwise_gradient(x, taps, *before or [None], dy)
            sums = jnp.sum(sums, axis=0)
        else:
            x = x + before[0].astype(x.dtype) if before else x
            dx, sums = depthwise_tpu.gelu_depthwise_gradient(x, taps, dy, gelu=bool(before))
            if before:
                last = jnp.sum(dx, axis=(0, 1, 2), dtype=sums.dtype)
                sums = jnp.concatenate([sums, last[None]])
        return dx, sums[None]

    weights = [taps] if before is None else [taps, before]
    split = (True, True, *[False] * len(weights))
    dx, sums = by_image(backward, split, mesh, x, dy, *weights)
    sums = jnp.sum(sums, axis=0)
    return dx, sums[:9], sums[9], None if before is None else sums[10]


_by_kernel.defvjp(
    lambda x, taps, bias, before, *how: (
        _by_kernel(x, taps, bias, before, *how),
        (x, taps, before),
    ),
    _by_kernel_backward,
)


@partial(jax.checkpoint, prevent_cse=False)  # the gradient keeps x, not its nine shifts
def _plain(x: jax.Array, taps: jax.Array, bias: jax.Array) -> jax.Array:
    return _correlate(x, jnp.concatenate([taps, jnp.asarray(bias, taps.dtype)[None]]))


@jax.custom_jvp
def _correlate(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Nine taps on the shifts of x, and the bias; `weights` (10, C) are at least float32."""
    b, h, w, c = x.shape
    # Per image, so that the gradients of the ten are sums within an image, and so within a device,
    # before the one over images. Ten plain sums each: as one reduction with ten results they need
    # more shared memory than a GPU has, and products that are stacked first are all written out.
    weights = jnp.broadcast_to(weights[None, :, None], (b, 10, 1, c))
    *taps, bias = jnp.split(weights, 10, axis=1)  # (B, 1, 1, C) each
    # Padded as it is and widened after the slice: what a TPU writes down is the padded map.
    padded, wider = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), wide(x.dtype)
    shifts = [
        padded[:, dy : dy + h, dx : dx + w].astype(wider) for dy in range(3) for dx in range(3)
    ]
    products = (tap * shift for tap, shift in zip(taps, shifts, strict=True))
    return (sum(products) + bias).astype(x.dtype)


@_correlate.defjvp
def _correlate_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x, weights), (dx, dweights) = primals, tangents
    by_weights = jax.lax.platform_dependent(x, dweights, cpu=_correlate_rows, default=_correlate)
    return _correlate(x, weights), _spread(dx, weights[:9]) + by_weights


def _spread(x: jax.Array, taps: jax.Array) -> jax.Array:
    """`_correlate` without a bias, by moving the products: its transpose is what matters.

    That pads the gradient of y once, in its own dtype, slices it and sums in that of the taps. The
    transpose of `_correlate` itself pads nine products: on CPU whatever computes the gradient of y
    is then run nine times. In forward mode alone the nine are summed in the dtype of `x`.
    """
    products = [(x.astype(taps.dtype) * tap).astype(x.dtype) for tap in taps]
    total = sum(
        jnp.pad(products[3 * dy + dx], ((0, 0), (2 - dy, dy), (2 - dx, dx), (0, 0)))
        for dy in range(3)
        for dx in range(3)
    )
    return total[:, 1:-1, 1:-1]


@partial(jax.checkpoint, prevent_cse=False)
def _correlate_rows(x: jax.Array, weights: jax.Array) -> jax.Array:
    """`_correlate`, row by row: its transpose by the weights is what matters, on CPU.

    That multiplies and adds in one pass over x and the gradient of y, a row of all images at a
    time. The transpose of `_correlate` writes nine shifts of x out before it sums.
    """
    b, h, w, c = x.shape
    # The gradients of the ten are summed within an image first, as those of `_correlate`.
    taps = jnp.broadcast_to(weights[None, :, None], (b, 10, 1, c))
    taps = [jnp.broadcast_to(tap[:, 0], (b, w, c)) for tap in jnp.split(taps, 10, axis=1)]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    @partial(jax.checkpoint, prevent_cse=False)
    def row(y: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(padded, y, 3, axis=1).astype(wide(x.dtype))
        shifts = [rows[:, dy, dx : dx + w] for dy in range(3) for dx in range(3)]
        products = (tap * shift for tap, shift in zip(taps, shifts, strict=False))
        return sum(products) + taps[9]

    return jnp.moveaxis(jax.lax.map(row, jnp.arange(h)), 0, 1).astype(x.dtype)
