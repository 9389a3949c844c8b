"""Pictures that a person names: which files, and their crops, decoded ahead of their use."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from stvit_jax import places
from stvit_jax.data.decode import UnreadableImage, eval_image
from stvit_jax.data.sources.scan import LeftOut, images_below
from stvit_jax.errors import UserError, listing, one_line, reason

THREADS = 8  # decoding leaves Python's lock

Crop = np.ndarray | UnreadableImage


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
    starts = range(0, len(paths), batch_size)
    with ThreadPoolExecutor(THREADS) as pool:
        batches = (
            pool.map(lambda path: _crop(path, image_size), paths[start : start + batch_size])
            for start in starts
        )
        ahead = next(batches)
        for following in batches:
            yield list(ahead)
            ahead = following
        yield list(ahead)


def _crop(path: str, image_size: int) -> Crop:
    try:
        with open(path, "rb") as file:
            return eval_image(file.read(), image_size)
    except UnreadableImage as error:
        return error
    except OSError as error:
        return UnreadableImage(reason(error))
