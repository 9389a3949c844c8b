"""Pictures that a person names: which files, and what a network sees, decoded ahead of its use."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from stvit_jax import places
from stvit_jax.data.cv2_resize import resize_bilinear
from stvit_jax.data.decode import UnreadableImage, decode_rgb, eval_image
from stvit_jax.data.scenes import resized_size
from stvit_jax.data.sources.scan import LeftOut, images_below
from stvit_jax.errors import UserError, listing, one_line, reason

THREADS = 8  # decoding leaves Python's lock

LONGEST = 4  # times the short side: the box of a scene, as 2048 x 512 is

Crop = np.ndarray | UnreadableImage
Scene = tuple[np.ndarray, np.ndarray] | UnreadableImage


def find(names: Sequence[str], left_out: LeftOut) -> list[str]:
    """Paths of the pictures, in the order of `names`; of a folder all that are below it.

    Args:
      names: files, taken for pictures whatever they are called, and folders.
      left_out: takes account of what in the folders is no picture.

    Raises:
      UserError: one of them is not there or cannot be read, or no picture is in any.
    """
    found: list[str] = []
    for name in names:
        if places.is_address(name):
            raise UserError(f"{one_line(name)}: pictures are read from this machine: copy them")
        if os.path.isdir(name):
            found += images_below(name, left_out)
        elif os.path.isfile(name):
            found.append(name)
        elif os.path.lexists(name):
            raise UserError(f"{one_line(name)} is neither a file nor a folder")
        else:
            raise UserError(f"there is no file or folder {one_line(name)}")
    if not found:
        there = f" (left out: {left_out})" if left_out else ""
        raise UserError(f"there are no pictures in {listing(names)}{there}: name files or folders")
    return found


def crops(paths: Sequence[str], image_size: int, batch_size: int) -> Iterator[list[Crop]]:
    """The evaluation crops of `batch_size` pictures at a time, at least one; the last of fewer.

    While a batch is being used, the next is read.

    Yields:
      For each picture uint8 (S, S, 3), RGB, or why there is none.
    """
    return _ahead(partial(eval_image, image_size=image_size), paths, batch_size)


def scenes(paths: Sequence[str], short: int) -> Iterator[Scene]:
    """Whole pictures, one by one, and what a segmenter sees of them: resized as in its tests.

    Yields:
      For each picture uint8 (H, W, 3), RGB, and uint8 (h, w, 3), of the largest size that fits into
      a box with sides of `short` and LONGEST times that; or why there is none.
    """
    return (scene for (scene,) in _ahead(partial(whole_scene, short=short), paths, 1))


def whole_scene(data: bytes, short: int) -> tuple[np.ndarray, np.ndarray]:
    """One of `scenes`, out of the bytes of a picture.

    Raises:
      UnreadableImage: `data` is no image, is damaged, or is too large.
    """
    pixels = decode_rgb(data)
    size = resized_size(*pixels.shape[:2], LONGEST * short, short)
    return pixels, resize_bilinear(pixels, size)


def _ahead(
    cut: Callable[[bytes], Any], paths: Sequence[str], batch_size: int
) -> Iterator[list[Any]]:
    """What `cut` makes of so many files at a time; the next are read while these are used."""
    starts = range(0, len(paths), batch_size)
    with ThreadPoolExecutor(THREADS) as pool:
        batches = (
            pool.map(partial(_of_file, cut), paths[start : start + batch_size]) for start in starts
        )
        ahead = next(batches)
        for following in batches:
            yield list(ahead)
            ahead = following
        yield list(ahead)


def _of_file(cut: Callable[[bytes], Any], path: str) -> Any:
    try:
        with open(path, "rb") as file:
            return cut(file.read())
    except UnreadableImage as error:
        return error
    except OSError as error:
        return UnreadableImage(reason(error))
