"""GELU and the residual depthwise 3x3 convolution as one kernel for Hopper GPUs, and its gradient.

Written in Pallas, Mosaic GPU. A program takes a block of channels of a few images and walks down
their rows, which arrive by asynchronous copies, several ahead. A row is read once: it is added to
the sums of the rows above, at and below it, which are kept in registers, so nothing is read again
at the edges of tiles, and shared memory is read three times a pixel instead of nine. What crosses
device memory is x and y, and in the gradient x, the gradient of y and that of x, in bfloat16, once
each; float32 is inside only.

Shapes: B images, H x W pixels, C channels.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_THREADS = 128  # of a program: one warpgroup
_COPY_LIMIT = 256  # elements of a side that an asynchronous copy takes at most
_AHEAD = 4  # rows that are loaded or held at a time
_IMAGES = 4  # of a program of the gradient, which sums over them
# Of a thread's registers: sums that wait for the next row, and as many as where there is no other
# cut.
_WAITING = (48, 64)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the rows of a map (B, H, W, C) are cut.

    Attributes:
      channels: of a program.
      columns: pixels of a row that the threads take at once.
      vector: neighbouring channels of a thread.
    """

    channels: int
    columns: int
    vector: int

    @property
    def margin(self) -> int:
        """Zero pixels left and right of a row; rows begin where a copy can end, at 128 bytes."""
        return max(1, 64 // self.channels)


def tiling(w: int, c: int) -> Tiling | None:
    """The cut of rows of `w` pixels and `c` channels; None where these do not divide."""
    # 32 threads read 128 bytes of shared memory at a time, or half of it.
    for most, vector, columns in itertools.product(_WAITING, (2, 1), (1, 2, 4, 8)):
        channels = _THREADS * vector // columns
        fits = 32 <= channels <= _COPY_LIMIT and w <= _COPY_LIMIT
        waiting = 2 * w * channels // _THREADS
        if fits and w % columns == 0 and c % channels == 0 and waiting <= most:
            return Tiling(channels, columns, vector)
    return None


def takes(w: int, c: int) -> bool:
    """Whether the kernels take maps (any, any, w, c)."""
    return tiling(w, c) is not None


class _Rows:
    """What a kernel does with a row: in chunks of columns, in registers."""

    def __init__(self, cut: Tiling, w: int, interpret: Any) -> None:
        self.cut, self.w, self.interpret = cut, w, interpret
        self.shape = (cut.columns, cut.channels)
        self.layout = plgpu.Layout.WG_STRIDED(self.shape, vec_size=cut.vector)
        self.chunks = range(w // cut.columns)

    def load(self, ref: Any, *index: Any) -> jax.Array:
        """A chunk, as float32. The interpreter knows no layouts."""
        x = ref[index]
        return (x if self.interpret else plgpu.layout_cast(x, self.layout)).astype(jnp.float32)

    def chunk(self, j: int, shift: int = 0) -> Any:
        """Columns of chunk j, `shift` pixels to the right."""
        return pl.ds(j * self.cut.columns + shift, self.cut.columns)

    def three(self, ref: Any, slot: Any, j: int) -> list[jax.Array]:
        """Chunk j of a row with margins, moved by -1, 0, 1."""
        return [
            self.load(ref, slot, self.chunk(j, self.cut.margin + d), slice(None))
            for d in (-1, 0, 1)
        ]

    def zeros(self) -> jax.Array:
        x = jnp.zeros(self.shape, jnp.float32)
        return x if self.interpret else plgpu.layout_cast(x, self.layout)

    def clear(self, ref: Any) -> None:
        """Zeros in a buffer of rows."""
        x = jnp.zeros(ref.shape[1:], jnp.bfloat16)
        layout = plgpu.Layout.WG_STRIDED(x.shape, vec_size=1)
        for slot in range(ref.shape[0]):
            ref[slot] = x if self.interpret else plgpu.layout_cast(x, layout)

    def spread(self, weights: jax.Array) -> jax.Array:
        """(n, C) as the programs load it: (C / channels, n, columns, channels)."""
        n, c = weights.shape
        blocks = weights.astype(jnp.float32).reshape(n, -1, 1, self.cut.channels).swapaxes(0, 1)
        return jnp.broadcast_to(blocks, (c // self.cut.channels, n, *self.shape))


def gelu_depthwise(
    x: jax.Array,
    taps: jax.Array,
    bias: jax.Array,
    before: jax.Array | None,
    *,
    interpret: Any = None,
) -> jax.Array:
    """The depthwise convolution of g(x), padded with one zero on all sides, plus `bias`.

    Args:
      x: (B, H, W, C), bfloat16; `tiling` must know a cut of it.
      taps: (9, C), row-major; the residual is inside the centre.
      bias: (C,).
      before: (C,): g is GELU of x plus this, rounded to bfloat16; None: g is x.
      interpret: for tests, the interpreter's parameters.

    Returns:
      (B, H, W, C), bfloat16.
    """
    b, h, w, c = x.shape
    cut = tiling(w, c)
    rows = _Rows(cut, w, interpret)
    weights = [taps, bias[None], *([] if before is None else [before[None]])]

    def kernel(x_hbm, weights_hbm, y_hbm, arriving, row, out, arrived):
        image, block = jax.lax.axis_index("images"), jax.lax.axis_index("channels")
        channels = pl.ds(block * cut.channels, cut.channels)

        def fetch(r: Any) -> None:
            slot = r % _AHEAD
            source = x_hbm.at[image, r, :, channels]
            plgpu.copy_gmem_to_smem(source, arriving.at[slot], arrived.at[slot])

        for r in range(min(_AHEAD, h)):
            fetch(r)
        rows.clear(row)  # the margins stay zero
        weight = [rows.load(weights_hbm, block, k, slice(None), slice(None)) for k in range(10)]
        moved = before is not None and rows.load(weights_hbm, block, 10, slice(None), slice(None))

        def write(r: Any, j: int, y: jax.Array) -> None:
            out[r % 3, rows.chunk(j), :] = y.astype(jnp.bfloat16)

        def send(r: Any) -> None:
            plgpu.copy_smem_to_gmem(out.at[r % 3], y_hbm.at[image, r, :, channels])

        def of_row(r: Any, carry: tuple) -> tuple:
            above, at = map(list, carry)  # sums of the rows r - 1 and r, as far as known
            slot = r % _AHEAD
            plgpu.barrier_wait(arrived.at[slot])
            for j in rows.chunks:
                g = rows.load(arriving, slot, rows.chunk(j), slice(None))
                g = g if before is None else _gelu(g + moved)
                row[r % 2, rows.chunk(j, cut.margin), :] = g.astype(jnp.bfloat16)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # of the row before the last
            plgpu.commit_smem()
            pl.when(r + _AHEAD < h)(lambda: fetch(r + _AHEAD))
            for j in rows.chunks:
                three = rows.three(row, r % 2, j)
                write(r + 2, j, _dot(three, weight[6:9], above[j]))  # of row r - 1
                above[j] = _dot(three, weight[3:6], at[j])
                at[j] = _dot(three, weight[:3], weight[9])
            plgpu.commit_smem()
            pl.when(r > 0)(lambda: send(r - 1))
            return tuple(above), tuple(at)

        above = tuple(rows.zeros() for _ in rows.chunks)
        at = tuple(weight[9] for _ in rows.chunks)
        last, _ = jax.lax.fori_loop(0, h, of_row, (above, at))
        for j in rows.chunks:
            write(h - 1, j, last[j])
        plgpu.commit_smem()
        send(h - 1)
        plgpu.wait_smem_to_gmem(0)

    return _call(
        kernel,
        jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
        (b, c // cut.channels),
        [
            plgpu.SMEM((_AHEAD, w, cut.channels), jnp.bfloat16),
            plgpu.SMEM((2, w + 2 * cut.margin, cut.channels), jnp.bfloat16),
            plgpu.SMEM((3, w, cut.channels), jnp.bfloat16),
            plgpu.Barrier(num_barriers=_AHEAD),
        ],
        interpret,
    )(x, rows.spread(jnp.concatenate(weights)))


def groups(b: int) -> int:
    """How many partial sums `gelu_depthwise_gradient` returns for so many images."""
    return b // math.gcd(b, _IMAGES)


def gelu_depthwise_gradient(
    x: jax.Array,
    taps: jax.Array,
    before: jax.Array | None,
    dy: jax.Array,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The gradient of `gelu_depthwise`.

    Args:
      x: (B, H, W, C), bfloat16.
      taps: (9, C).
      before: (C,) or None.
      dy: the gradient of y, (B, H, W, C), bfloat16.
      interpret: as there.

    Returns:
      The gradient of x, (B, H, W, C), bfloat16, and partial sums of those of the nine taps, of the
      bias and, where it is, of `before`: (`groups(B)`, 10 or 11, C), float32.
    """
    b, h, w, c = x.shape
    cut = tiling(w, c)
    rows = _Rows(cut, w, interpret)
    weights = [taps, *([] if before is None else [before[None]])]
    sums = 10 if before is None else 11
    images = b // groups(b)
    blocks = c // cut.channels

    def kernel(x_hbm, dy_hbm, weights_hbm, dx_hbm, sums_hbm, xs, dys, gs, out, arrived):
        group, block = jax.lax.axis_index("images"), jax.lax.axis_index("channels")
        channels = pl.ds(block * cut.channels, cut.channels)

        # Steps count the rows of all images; a row is in the slot of its step.
        def fetch(step: Any) -> None:
            index = (group * images + step // h, step % h, slice(None), channels)
            slot, inside = step % _AHEAD, pl.ds(cut.margin, w)
            plgpu.copy_gmem_to_smem(x_hbm.at[index], xs.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(dy_hbm.at[index], dys.at[slot, inside], arrived.at[slot])

        # Margins stay zero, and what is multiplied by zero before the first row must be a number.
        for buffer in (xs, dys, gs):
            rows.clear(buffer)
        plgpu.commit_smem()
        # Two rows are still in use when the next arrives.
        for step in range(min(_AHEAD - 2, images * h)):
            fetch(step)
        weight = [rows.load(weights_hbm, block, k, slice(None), slice(None)) for k in range(9)]
        moved = before is not None and rows.load(weights_hbm, block, 9, slice(None), slice(None))

        def read(step: Any, j: int) -> jax.Array:
            x = rows.load(xs, step % _AHEAD, rows.chunk(j), slice(None))
            return x if before is None else x + moved

        def take(
            n: Any, step: Any, r: Any, j: int, dg: jax.Array, total: list, *, last: bool
        ) -> None:
            """Row r - 1 has its gradient of g: out goes that of x, and the sums get its share.

            `last`: there is no row r any more.
            """
            real = jnp.where(r > 0, 1.0, 0.0)  # else there is no such row yet
            centre = rows.chunk(j, cut.margin)
            one, two = step + _AHEAD - 1, step + _AHEAD - 2  # rows before; never negative
            dx = dg
            if before is not None:
                dx = dg * _gelu_slope(read(one, j))
                total[10] += dx * real
            out[n % 3, rows.chunk(j), :] = dx.astype(jnp.bfloat16)
            three = [g * real for g in rows.three(gs, (step + 1) % 2, j)]
            above = rows.load(dys, two % _AHEAD, centre, slice(None))
            above = above * jnp.where(r > 1, 1.0, 0.0)
            at = rows.load(dys, one % _AHEAD, centre, slice(None))
            total[9] += at * real
            for k in range(3):
                if not last:
                    below = rows.load(dys, step % _AHEAD, centre, slice(None))
                    total[k] += three[k] * below
                total[3 + k] += three[k] * at
                total[6 + k] += three[k] * above

        def send(n: Any, step: Any) -> None:
            target = dx_hbm.at[group * images + step // h, step % h, :, channels]
            plgpu.copy_smem_to_gmem(out.at[n % 3], target)

        def of_row(r: Any, carry: tuple, image: Any) -> tuple:
            above, at, total = map(list, carry)  # the first two as in `gelu_depthwise`, of dy
            step = image * h + r
            n = step + image  # what is written: a row more an image, the one that is not sent
            plgpu.barrier_wait(arrived.at[step % _AHEAD])
            for j in rows.chunks:
                g = read(step, j)
                g = g if before is None else _gelu(g)
                gs[step % 2, rows.chunk(j, cut.margin), :] = g.astype(jnp.bfloat16)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            plgpu.commit_smem()
            for j in rows.chunks:
                three = rows.three(dys, step % _AHEAD, j)[::-1]
                dg = _dot(three, weight[:3], above[j])
                take(n, step, r, j, dg, total, last=False)
                above[j] = _dot(three, weight[3:6], at[j])
                at[j] = _dot(three, weight[6:9], None)
            plgpu.commit_smem()
            pl.when(r > 0)(lambda: send(n, step - 1))
            ahead = step + _AHEAD - 2
            pl.when(ahead < images * h)(lambda: fetch(ahead))
            return tuple(above), tuple(at), tuple(total)

        def of_image(image: Any, total: tuple) -> tuple:
            nothing = tuple(rows.zeros() for _ in rows.chunks)
            last, _, total = jax.lax.fori_loop(
                0, h, lambda r, carry: of_row(r, carry, image), (nothing, nothing, total)
            )
            step, total = image * h + h, list(total)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            plgpu.commit_smem()
            for j in rows.chunks:
                take(step + image, step, h, j, last[j], total, last=True)
            plgpu.commit_smem()
            send(step + image, step - 1)
            return tuple(total)

        start = tuple(rows.zeros() for _ in range(sums))
        total = jax.lax.fori_loop(0, images, of_image, start)
        for k in range(sums):
            sums_hbm[group, block, k] = total[k]
        plgpu.wait_smem_to_gmem(0)

    padded = (w + 2 * cut.margin, cut.channels)
    dx, total = _call(
        kernel,
        (
            jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
            jax.ShapeDtypeStruct((groups(b), blocks, sums, *rows.shape), jnp.float32),
        ),
        (groups(b), blocks),
        [
            plgpu.SMEM((_AHEAD, w, cut.channels), jnp.bfloat16),
            plgpu.SMEM((_AHEAD, *padded), jnp.bfloat16),
            plgpu.SMEM((2, *padded), jnp.bfloat16),
            plgpu.SMEM((3, w, cut.channels), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=2, num_barriers=_AHEAD),
        ],
        interpret,
    )(x, dy, rows.spread(jnp.concatenate(weights)))
    return dx, total.sum(3).swapaxes(1, 2).reshape(groups(b), sums, c)


def _call(
    kernel: Callable, out: Any, grid: tuple[int, int], scratch: list, interpret: Any
) -> Callable:
    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=grid,
        grid_names=("images", "channels"),
        scratch_types=scratch,
        # The default of jax 0.10; that of 0.12 has no erf.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({"interpret": interpret} if interpret else {}),
    )


def _dot(values: list[jax.Array], weights: list[jax.Array], start: jax.Array | None) -> jax.Array:
    for value, weight in zip(values, weights, strict=True):
        start = value * weight if start is None else start + value * weight
    return start


def _gelu(x: jax.Array) -> jax.Array:
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def _gelu_slope(x: jax.Array) -> jax.Array:
    normal = jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5
    return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5)) + x * normal
