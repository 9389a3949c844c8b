"""OpenCV's resizing of uint8 images, bit by bit, for a window of the result at a time.

mmsegmentation resizes with OpenCV: bilinear without antialiasing, in fixed point, where Pillow
averages when it shrinks. OpenCV itself is not needed for that, and would resize all of an image for
a crop of it; here the window alone is computed, from the rows and columns that it needs.

Shapes: H, W height and width of the image, h, w those of the window.
"""

import functools

import numpy as np

Size = tuple[int, int]  # height, width
Window = tuple[int, int, int, int]  # top, left, height, width

_ONE = 2048  # of a weight in fixed point
_BLOCK = 2**15  # pixels worked on at a time, so that what lies between the passes stays in caches


def resize_bilinear(image: np.ndarray, size: Size, window: Window | None = None) -> np.ndarray:
    """`cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)`, or a window of it.

    Args:
        image: uint8 (H, W, 3), neither side 0.
        size: height and width of the whole result.
        window: the part of the result that is wanted; None: all of it.

    Returns:
        uint8 (h, w, 3).
    """
    top, left, height, width = window or (0, 0, *size)
    rows, columns = slice(top, top + height), slice(left, left + width)
    if size == image.shape[:2]:
        return image[rows, columns]
    x0, x1, a0, a1 = (axis[columns] for axis in _columns(image.shape[1], size[1]))
    y0, y1, b0, b1 = (axis[rows] for axis in _rows(image.shape[0], size[0]))
    first, last = int(x0[0]), int(x1[-1]) + 1
    # A pixel is one word of four bytes: a gather of columns moves words, and loops are long.
    x0, x1, a0, a1 = x0 - first, x1 - first, a0.repeat(4), a1.repeat(4)
    result = np.empty((height, width, 3), np.uint8)
    step = max(1, _BLOCK // width)
    for start in range(0, height, step):
        block = slice(start, start + step)
        low, high = int(y0[block][0]), int(y1[block][-1]) + 1
        pixels = np.zeros((high - low, last - first, 4), np.uint8)
        pixels[..., :3] = image[low:high, first:last]
        words = pixels.view(np.uint32)[..., 0]
        across = words.take(x0, axis=1).view(np.uint8) * a0  # (rows, 4w) int32
        across += words.take(x1, axis=1).view(np.uint8) * a1
        across >>= 4
        total = across.take(y0[block] - low, axis=0)
        total *= b0[block, None]
        total >>= 16
        below = across.take(y1[block] - low, axis=0)
        below *= b1[block, None]
        below >>= 16
        total += below
        total += 2
        total >>= 2  # within 0..255, as the weights sum to 1
        result[block] = total.astype(np.uint8).reshape(-1, width, 4)[..., :3]
    return result


def resize_nearest(label: np.ndarray, size: Size, window: Window | None = None) -> np.ndarray:
    """`cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)`, or a window of it.

    Args:
        label: (H, W), of any type, neither side 0.
        size: height and width of the whole result.
        window: the part of the result that is wanted; None: all of it.

    Returns:
        (h, w), of the type of `label`.
    """
    top, left, height, width = window or (0, 0, *size)
    rows = _nearest(label.shape[0], size[0])[top : top + height]
    columns = _nearest(label.shape[1], size[1])[left : left + width]
    return label.take(rows, axis=0).take(columns, axis=1)


def _nearest(n_in: int, n_out: int) -> np.ndarray:
    # OpenCV's doubles, not whole numbers: its scale is one over a quotient.
    scale = 1 / (n_out / n_in)
    return np.minimum(np.floor(np.arange(n_out) * scale).astype(np.intp), n_in - 1)


@functools.lru_cache(maxsize=64)  # sizes of a set; an entry takes 24 bytes a pixel of an axis
def _columns(n_in: int, n_out: int) -> tuple[np.ndarray, ...]:
    """By column of the result: the two of the image that it lies between, and their weights."""
    whole, fraction = _positions(n_in, n_out)
    outside = (whole < 0) | (whole >= n_in - 1)
    whole = whole.clip(0, n_in - 1)
    return whole, np.minimum(whole + 1, n_in - 1), *_weights(np.where(outside, 0, fraction))


@functools.lru_cache(maxsize=64)
def _rows(n_in: int, n_out: int) -> tuple[np.ndarray, ...]:
    """By row of the result: as `_columns`. Outside, both rows are the same and keep weights."""
    whole, fraction = _positions(n_in, n_out)
    return whole.clip(0, n_in - 1), (whole + 1).clip(0, n_in - 1), *_weights(fraction)


def _positions(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the centres of the result lie in the image: whole part (int64), fraction (float32)."""
    scale = 1 / (n_out / n_in)
    position = ((np.arange(n_out) + 0.5) * scale - 0.5).astype(np.float32)
    whole = np.floor(position)
    return whole.astype(np.intp), position - whole


def _weights(fraction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    fraction = fraction.astype(np.float32)
    one = np.float32(1)
    return tuple(np.rint(part * _ONE).astype(np.int32) for part in (one - fraction, fraction))
