"""Annotations of segmentation: PNG files with a class for every pixel, as ADE20K has them.

The value 0 is ignored, 1 to K are the classes in their order, and 255 is ignored, too. Labels are
what is learned from: 0 to K - 1, and IGNORED.
"""

import io
from typing import BinaryIO

import numpy as np
from PIL import Image

from stvit_jax.data.decode import FORMATS, MAX_PIXELS, UnreadableImage
from stvit_jax.data.signatures import what_else
from stvit_jax.errors import described, listing

IGNORED = 255
MOST_CLASSES = 254  # in a byte, beside the two values that are ignored
Size = tuple[int, int]  # height, width

_NO_CLASS = 254  # a label that none of them has
# Grey of fewer bits, which Pillow spreads over 0..255, and by what it multiplies.
_SPREAD = {"L;2": 85, "L;4": 17}


class WrongAnnotation(UnreadableImage):
    """An annotation that is an image, but not one of classes, or not of its image."""


def read_annotation(data: bytes, classes: int) -> np.ndarray:
    """Labels out of the bytes of an annotation.

    Args:
        data: the PNG.
        classes: K, at most MOST_CLASSES.

    Returns:
        uint8 (H, W): 0 to K - 1, and IGNORED.

    Raises:
        UnreadableImage: `data` is no image, or is damaged.
        WrongAnnotation: it has colours or 16 bits instead of one byte a pixel, or values that are
            no class; `known` has a "label" of its size that is ignored everywhere.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            spread = _SPREAD.get(str(image.tile[0].args), 1) if image.tile else 1
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage(f"its annotation has more than {MAX_PIXELS} pixels")
            if image.mode not in ("L", "P", "1"):
                raise _wrong(
                    image.size[::-1],
                    f"its annotation has pixels of mode {image.mode}: write it as a PNG with one "
                    "byte a pixel, the number of the class",
                )
            values = np.asarray(image).astype(np.uint8)
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen different types.
        reason = what_else(data) if data[:4] != b"\x89PNG" else described(error)
        raise UnreadableImage(f"its annotation cannot be read ({reason})") from error
    label = _labels(classes)[values // spread if spread > 1 else values]
    if (label == _NO_CLASS).any():
        wrong = np.unique(values[label == _NO_CLASS]).tolist()
        raise _wrong(
            label.shape,
            f"its annotation has values that are none of 0 (ignored), 1..{classes} (the classes) "
            f"and 255 (ignored), but {listing(wrong)}: correct it, or the list of classes",
        )
    return label


def write_annotation(label: np.ndarray, palette: np.ndarray) -> bytes:
    """The PNG that `read_annotation` reads as these labels, its values in the colours of classes.

    Args:
        label: uint8 (H, W): 0 to K - 1, and IGNORED.
        palette: uint8 (K, 3), RGB; K is at most MOST_CLASSES.
    """
    image = Image.fromarray(label + np.uint8(1))  # IGNORED becomes 0
    image.putpalette(np.concatenate([np.zeros((1, 3), np.uint8), palette]).tobytes())
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def check_size(label: np.ndarray, height: int, width: int) -> None:
    """That a label has the size of its image.

    Raises:
        WrongAnnotation: it has not; `known` has the label.
    """
    if label.shape != (height, width):
        error = WrongAnnotation(
            f"its annotation has {label.shape[1]} x {label.shape[0]} pixels, the image {width} x "
            f"{height}: make them the same size, pixel by pixel"
        )
        error.known = {"label": label}
        raise error


def header_size(file: str | BinaryIO) -> Size | None:
    """Height and width of an image by its header; None where that cannot be read."""
    try:
        with Image.open(file, formats=FORMATS) as header:
            return header.height, header.width
    except Exception:  # a file that is gone, or any of what Pillow's decoders raise
        return None


def scene_size(image: str | BinaryIO, annotation: str | BinaryIO) -> Size:
    """Height and width of the annotation of a scene or, where it has no header, of the image.

    The annotation comes first, so that labels of wrong pairs fit into what was made for them.

    Returns:
        (0, 0) where neither can be read.
    """
    return header_size(annotation) or header_size(image) or (0, 0)


def _labels(classes: int) -> np.ndarray:
    """The label of every value."""
    table = np.full(256, _NO_CLASS, np.uint8)
    table[[0, 255]] = IGNORED
    table[1 : classes + 1] = np.arange(classes)
    return table


def _wrong(size: Size, reason: str) -> WrongAnnotation:
    error = WrongAnnotation(reason)
    error.known = {"label": np.full(size, IGNORED, np.uint8)}
    return error
