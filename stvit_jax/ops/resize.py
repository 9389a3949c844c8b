"""Maps of other sizes, by the rules of PyTorch's `interpolate` and `AdaptiveAvgPool2d`.

`bilinear` takes pixel centres as they are (align_corners=False) and never averages when it shrinks
a map (no antialias, which `jax.image.resize` has by default). Maps narrower than float32 are
computed in float32, and the result is rounded once.

Shapes: B images, H x W pixels, C channels.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from stvit_jax.ops.precision import wide

Size = tuple[int, int]


def bilinear(x: jax.Array, size: Size) -> jax.Array:
    """Interpolates between the two nearest rows and columns; at the border the outermost counts.

    Ratios that are whole and even are computed at once, see `squares`. Otherwise, and in the
    gradient, it is an axis after the other: one that grows by a whole number is a sum of shifted
    maps, one for every place between two pixels, whose gradient is one, too, where that of a gather
    would be a scatter. Any other ratio is a product with a matrix of two numbers a row.

    Args:
      x: (B, H, W, C), of floats.
      size: height and width to take it to, any.

    Returns:
      (B, *size, C), in the dtype of x.
    """
    return _at_once(x, size) if in_squares(x.shape[1:3], size) else _by_axis(x, size)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _at_once(x: jax.Array, size: Size) -> jax.Array:
    (h, w), (height, width) = x.shape[1:3], size
    ratios = height // h, width // w
    y = squares(x.astype(wide(x.dtype)), ratios).swapaxes(2, 3)
    y = y.reshape(-1, height + ratios[0], width + ratios[1], x.shape[-1])
    top, left = (ratio // 2 for ratio in ratios)
    return y[:, top : height + top, left : width + left].astype(x.dtype)


@_at_once.defjvp
def _at_once_jvp(size: Size, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return _at_once(*primals, size), _by_axis(*tangents, size)


def _by_axis(x: jax.Array, size: Size) -> jax.Array:
    y = x.astype(wide(x.dtype))
    for axis, n_out in zip((1, 2), size, strict=True):
        n_in = y.shape[axis]
        if n_out == n_in:
            continue
        if n_out % n_in == 0:
            y = _enlarged(y, axis, n_out // n_in)
        else:
            y = _along(y, axis, _interpolation(n_in, n_out))
    return y.astype(x.dtype)


def in_squares(before: Size, after: Size) -> bool:
    """Whether the ratios of two sizes are whole and even, so that `squares` are whole."""
    return all(n_out % (2 * n_in) == 0 for n_in, n_out in zip(before, after, strict=True))


def squares(x: jax.Array, ratios: Size) -> jax.Array:
    """Maps (B, H, W, C), enlarged by even ratios (y, x): (B, H + 1, W + 1, y, x, C).

    Square (i, j) has the pixels between rows i - 1 and i, columns j - 1 and j, which depend on
    these four alone: a sum of four shifted maps, which XLA computes in one go, or where it is
    needed. What is half a square or less beyond the border is not part of the enlarged map.
    """
    total = 0
    for i, j, share in corners(x, ratios):
        shifted = jnp.pad(x, ((0, 0), (1 - i, i), (1 - j, j), (0, 0)))
        total += shifted[:, :, :, None, None] * share
    return total


def corners(x: jax.Array, ratios: Size) -> Iterator[tuple[int, int, jax.Array]]:
    """Of each corner of `squares` (0: above, left; 1: below, right), what a pixel has of it.

    (H + 1, W + 1, y, x, 1), in the dtype of x; at the border it has all of the one there is.
    """
    rows, columns = (_shares(n, m) for n, m in zip(x.shape[1:3], ratios, strict=True))
    for i, row in enumerate(rows.astype(x.dtype)):
        for j, column in enumerate(columns.astype(x.dtype)):
            yield i, j, jnp.asarray(row[:, None, :, None, None]) * column[:, None, :, None]


def _shares(n: int, m: int) -> np.ndarray:
    """What m pixels between two have of the first and the second, (2, n + 1, m)."""
    second = np.tile((np.arange(m) + 0.5) / m, (n + 1, 1))
    second[0], second[-1] = 1, 0
    return np.stack([1 - second, second])


def bilinear_each(x: jax.Array, sizes: jax.Array, size: Size) -> jax.Array:
    """`bilinear`, each map to a size of its own that is known only when it runs.

    Args:
      x: (B, H, W, C), of floats.
      sizes: integers (B, 2), heights and widths to take them to; (2 n + 1) H is within int32.
      size: of the result, at least as large as any.

    Returns:
      (B, *size, C), in the dtype of x; of map i the first `sizes[i]` rows and columns are meant.
    """
    y, sizes = x.astype(wide(x.dtype)), jnp.maximum(sizes, 1)  # 0 in place of a picture
    for axis in (1, 2):
        own = partial(_gathered, axis=axis - 1, count=size[axis - 1])
        y = jax.vmap(own)(y, sizes[:, axis - 1])
    return y.astype(x.dtype)


def bilinear_row(x: jax.Array, row: jax.Array, size: jax.Array, width: int) -> jax.Array:
    """One row of what `bilinear_each` makes of a map, for maps that are too large as a whole.

    Args:
      x: (H, W, C), of floats.
      row: which, an integer.
      size: integers (2,), height and width to take the map to.
      width: of the result, at least as large as that of `size`.

    Returns:
      (width, C), in the dtype of x; the first `size[1]` are meant.
    """
    y = _gathered(x.astype(wide(x.dtype)), size[0], axis=0, count=1, first=row)
    return _gathered(y, size[1], axis=1, count=width)[0].astype(x.dtype)


def nearest(x: jax.Array, size: Size) -> jax.Array:
    """Takes pixel floor(i n_in / n_out) for pixel i of an axis, (B, H, W, C) to (B, *size, C).

    The ratio and its multiples are float32, as PyTorch has them: a pixel on the border between two
    may be either one's, and some that are not just below it are the upper one's.
    """
    for axis, n_out in zip((1, 2), size, strict=True):
        n_in = x.shape[axis]
        if n_out != n_in:
            scale = np.float32(n_in) / np.float32(n_out)
            index = np.floor(np.arange(n_out, dtype=np.float32) * scale).astype(np.int32)
            index = np.minimum(index, n_in - 1)
            x = jnp.take(x, index, axis, indices_are_sorted=True, mode="clip")
    return x


def adaptive_average_pool(x: jax.Array, bins: int) -> jax.Array:
    """Means of `bins` x `bins` parts of (B, H, W, C), which overlap where the size is no multiple.

    Part i of an axis of n pixels is [floor(i n / bins), ceil((i + 1) n / bins)); n may be less than
    `bins`.
    """
    y = x.astype(wide(x.dtype))
    for axis in (1, 2):
        n = x.shape[axis]
        matrix = np.zeros((bins, n))
        for i in range(bins):
            start, stop = i * n // bins, -(-(i + 1) * n // bins)
            matrix[i, start:stop] = 1 / (stop - start)
        y = _along(y, axis, matrix)
    return y.astype(x.dtype)


def _gathered(
    x: jax.Array, n_out: jax.Array, axis: int, count: int, first: jax.Array | int = 0
) -> jax.Array:
    """`count` pixels from `first` on along an axis of (H, W, C), where `n_out` make up the map."""
    n_in = x.shape[axis]
    # Whole numbers: where a pixel lies is exact, at any precision.
    at = jnp.maximum((2 * (first + jnp.arange(count)) + 1) * n_in - n_out, 0)
    below, rest = jnp.divmod(at, 2 * n_out)
    below = jnp.minimum(below, n_in - 1)
    part = (rest / (2 * n_out)).astype(x.dtype)[:, None]
    part = part[:, None] if axis == 0 else part
    lower = jnp.take(x, below, axis, mode="clip")
    upper = jnp.take(x, jnp.minimum(below + 1, n_in - 1), axis, mode="clip")
    return lower * (1 - part) + upper * part


def _enlarged(x: jax.Array, axis: int, ratio: int) -> jax.Array:
    """X with `ratio` pixels along an axis for each of its own."""
    n = x.shape[axis]

    def part(start: int, stop: int) -> jax.Array:
        return jax.lax.slice_in_dim(x, start, stop, axis=axis)

    before = jnp.concatenate([part(0, 1), part(0, n - 1)], axis)
    after = jnp.concatenate([part(1, n), part(n - 1, n)], axis)
    offsets = [(j + 0.5) / ratio - 0.5 for j in range(ratio)]
    placed = [x * (1 - abs(d)) + (before if d < 0 else after) * abs(d) for d in offsets]
    shape = (*x.shape[:axis], n * ratio, *x.shape[axis + 1 :])
    return jnp.stack(placed, axis + 1).reshape(shape)


def _interpolation(n_in: int, n_out: int) -> np.ndarray:
    """(n_out, n_in): what each pixel in has of each pixel out."""
    at = np.maximum((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, 0)
    below = np.minimum(np.floor(at).astype(int), n_in - 1)
    above = np.minimum(below + 1, n_in - 1)
    matrix = np.zeros((n_out, n_in))
    rows = np.arange(n_out)
    matrix[rows, below] += 1 - (at - below)
    matrix[rows, above] += at - below
    return matrix


def _along(x: jax.Array, axis: int, matrix: np.ndarray) -> jax.Array:
    """The product of `matrix` (O, I) and axis 1 or 2 of x, of I pixels."""
    subscripts = "oh,bhwc->bowc" if axis == 1 else "ow,bhwc->bhoc"
    return jnp.einsum(subscripts, jnp.asarray(matrix, x.dtype), x, precision="highest")
