"""GELU and the depthwise 3x3 convolution as one Pallas TPU kernel, and their gradient as another.

Each map crosses memory once; float32, the only thing that a v5e computes in, stays within the chip.

A map is taken as (H, W, ., .), images and channels last in the order in which XLA keeps them:
channels on the 128 lanes where they fill them, else images. So a shift moves nothing within a
register, and no map is copied on either side. The grid goes down the rows of a block of images and
channels. A row is computed when the one below it has come; three are kept, with zeros around them.

Shapes: B images, H x W pixels, C channels; a block has `rows` x `lanes` of images and channels, and
is worked on in pieces of `piece` rows, which registers hold.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
_PIECE = 16  # rows of a register of bfloat16
_ROW_BYTES = 2**20  # of a block: a dozen such fit what a kernel has of the chip's memory, 16 MB
_SHIFTS = [(dy, dx) for dy in range(3) for dx in range(3)]  # of the nine taps


def gelu_depthwise(
    x: jax.Array, taps: jax.Array, bias: jax.Array, *, gelu: bool, interpret: bool = False
) -> jax.Array:
    """Depthwise 3x3 convolution of x, or of its exact GELU, padded with one zero on all sides.

    Args:
      x: (B, H, W, C) bfloat16; B small, or a multiple of 16.
      taps: (9, C) float32, row-major; a residual is one more at the centre.
      bias: (C,) float32.
      gelu: whether the GELU comes before the convolution.
      interpret: run it without a TPU.

    Returns:
      (B, H, W, C) in the dtype of `x`, rounded once.
    """
    cut = _Cut.of(x.shape)
    call = cut.call(
        partial(_forward, cut=cut, gelu=gelu),
        inputs=[cut.row(0), cut.weights(10)],
        outputs=[(cut.row(-1), jax.ShapeDtypeStruct(cut.shape, x.dtype))],
        interpret=interpret,
    )
    (y,) = call(cut.ordered(x), cut.spread(jnp.concatenate([taps, bias[None]])))
    return cut.restored(y)


def gelu_depthwise_gradient(
    x: jax.Array, taps: jax.Array, dy: jax.Array, *, gelu: bool, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The gradients of `gelu_depthwise`.

    Args:
      x: its input.
      taps: its taps.
      dy: (B, H, W, C) bfloat16, the gradient of its result.
      gelu: as there.
      interpret: as there.

    Returns:
      The gradient of x in its dtype, and those of the nine taps and the bias, (10, C) float32.
    """
    cut = _Cut.of(x.shape)
    call = cut.call(
        partial(_gradient, cut=cut, gelu=gelu),
        inputs=[cut.row(0), cut.row(-1), cut.weights(9)],
        outputs=[(cut.row(-1), jax.ShapeDtypeStruct(cut.shape, x.dtype)), cut.sums],
        interpret=interpret,
    )
    dx, sums = call(cut.ordered(dy), cut.ordered(x), cut.spread(taps))
    return cut.restored(dx), jnp.sum(sums, (0, 3 if cut.images_last else 2))


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How a map (H, W, ., .) of `shape` is cut into blocks; `row`, `weights` and `sums` are these.

    The grid counts blocks of the third axis, of the fourth, and rows of pixels, one more than there
    are: the last has none below it.
    """

    shape: tuple[int, int, int, int]
    images_last: bool
    rows: int
    lanes: int
    piece: int

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "_Cut":
        b, h, w, c = shape
        images_last = c % _LANES != 0 and b % _LANES == 0
        third, fourth = (c, b) if images_last else (b, c)
        lanes = fourth if fourth % _LANES else _LANES
        most = max(_ROW_BYTES // (2 * w * lanes), _PIECE)
        fit = [n for n in range(_PIECE, min(third, most) + 1, _PIECE) if third % n == 0]
        rows = max(fit, default=third)
        return cls((h, w, third, fourth), images_last, rows, lanes, _PIECE if fit else third)

    def ordered(self, x: jax.Array) -> jax.Array:
        return x.transpose((1, 2, 3, 0) if self.images_last else (1, 2, 0, 3))

    def restored(self, x: jax.Array) -> jax.Array:
        return x.transpose((3, 0, 1, 2) if self.images_last else (2, 0, 1, 3))

    def spread(self, weights: jax.Array) -> jax.Array:
        """Weights (K, C) as blocks of a map meet them."""
        if self.images_last:
            return jnp.broadcast_to(weights[..., None], (*weights.shape, _LANES))
        return weights[:, None]

    def weights(self, count: int) -> pl.BlockSpec:
        if self.images_last:
            return pl.BlockSpec((count, self.rows, _LANES), lambda r, n, i: (0, r, 0))
        return pl.BlockSpec((count, 1, self.lanes), lambda r, n, i: (0, 0, n))

    def row(self, lag: int) -> pl.BlockSpec:
        """A row of pixels, `lag` before that of the grid."""
        return pl.BlockSpec(
            (None, self.shape[1], self.rows, self.lanes),
            lambda r, n, i: (jnp.clip(i + lag, 0, self.shape[0] - 1), 0, r, n),
        )

    @property
    def sums(self) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        """Ten sums over the pixels, and over the pieces of a block that share their channels."""
        _, _, third, fourth = self.shape
        if self.images_last:
            shape, block = (fourth // _LANES, 10, third, _LANES), (None, 10, self.rows, _LANES)
            spec = pl.BlockSpec(block, lambda r, n, i: (n, 0, r, 0))
        else:
            shape, block = (third // self.rows, 10, self.piece, fourth), (None, 10, self.piece)
            spec = pl.BlockSpec((*block, self.lanes), lambda r, n, i: (r, 0, 0, n))
        return spec, jax.ShapeDtypeStruct(shape, jnp.float32)

    def pieces(self, work: Callable[[Any, Any], None]) -> None:
        """Does `work` on every piece: its rows in a block, and those of its channels."""

        def body(k: jax.Array, _: None) -> None:
            at = pl.ds(pl.multiple_of(k * self.piece, self.piece), self.piece)
            work(at, at if self.images_last else slice(None))

        jax.lax.fori_loop(0, self.rows // self.piece, body, None)

    def call(
        self, kernel: Callable, inputs: list, outputs: list, interpret: bool
    ) -> Callable[..., tuple[jax.Array, ...]]:
        h, w, third, fourth = self.shape
        three_rows = pltpu.VMEM((3, w + 2, self.rows, self.lanes), jnp.float32)
        specs, shapes = zip(*outputs, strict=True)
        return pl.pallas_call(
            kernel,
            grid=(third // self.rows, fourth // self.lanes, h + 1),
            in_specs=inputs,
            out_specs=specs,
            out_shape=shapes,
            scratch_shapes=[three_rows],
            # Without it XLA takes a kernel for free, in its schedule and in its account.
            cost_estimate=pl.CostEstimate(
                flops=40 * math.prod(self.shape),
                transcendentals=math.prod(self.shape),
                bytes_accessed=2
                * len(inputs)
                * math.prod(self.shape),  # a map for each but weights
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            interpret=interpret,
        )


def _forward(x: Any, weights: Any, y: Any, three: Any, *, cut: _Cut, gelu: bool) -> None:
    """Takes a row of x into `three` and computes the row above it, of y."""
    i = pl.program_id(2)
    _enter(x, three, i, cut, _gelu if gelu else None)

    def piece(at: Any, channels: Any) -> None:
        *taps, bias = (weights[k, channels] for k in range(10))

        def pixel(j: jax.Array, _: None) -> None:
            total = bias
            for tap, (dy, dx) in zip(taps, _SHIFTS, strict=True):
                total = total + tap * three[(i + 1 + dy) % 3, j + dx, at]
            y[j, at] = total.astype(y.dtype)

        jax.lax.fori_loop(0, cut.shape[1], pixel, None)

    @pl.when(i > 0)
    def _() -> None:
        cut.pieces(piece)


def _gradient(
    dy: Any, x: Any, weights: Any, dx: Any, sums: Any, three: Any, *, cut: _Cut, gelu: bool
) -> None:
    """Takes a row of dy into `three` and computes the row above it, of dx.

    A tap's gradient is the sum of what enters the convolution times dy, shifted by what the tap
    shifts: the nine shifts that the gradient of x is made of.
    """
    i = pl.program_id(2)
    _enter(dy, three, i, cut, None)

    @pl.when(i == 0)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)

    def piece(at: Any, channels: Any) -> None:
        taps = [weights[k, channels] for k in range(9)]

        def pixel(j: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            shifts = [three[(i - ky) % 3, j + 2 - kx, at] for ky, kx in _SHIFTS]
            entered = x[j, at].astype(jnp.float32)
            slope = 1.0
            if gelu:
                entered, slope = _gelu(entered), _gelu_slope(entered)
            total = sum(map(jnp.multiply, taps, shifts))
            dx[j, at] = (total * slope).astype(dx.dtype)
            terms = [entered * shift for shift in shifts]
            return tuple(map(jnp.add, totals, [*terms, shifts[4]]))

        nothing = (jnp.zeros((cut.piece, cut.lanes), jnp.float32),) * 10
        for k, total in enumerate(jax.lax.fori_loop(0, cut.shape[1], pixel, nothing)):
            sums[k, channels] += total

    @pl.when(i > 0)
    def _() -> None:
        cut.pieces(piece)


def _enter(x: Any, three: Any, i: jax.Array, cut: _Cut, function: Callable | None) -> None:
    """Puts row i of x, or of a function of it, into `three`; zeros for the row after the last."""
    h, w, _, _ = cut.shape

    @pl.when(i == 0)
    def _() -> None:
        three[...] = jnp.zeros_like(three)

    def piece(at: Any, _: Any) -> None:
        def pixel(j: jax.Array, _: None) -> None:
            value = x[j, at].astype(jnp.float32)
            value = function(value) if function else value
            three[i % 3, j + 1, at] = jnp.where(i < h, value, 0)

        jax.lax.fori_loop(0, w, pixel, None)

    cut.pieces(piece)


def _gelu(x: jax.Array) -> jax.Array:
    return x * _normal_cdf(x)


def _gelu_slope(x: jax.Array) -> jax.Array:
    return _normal_cdf(x) + x * jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)
