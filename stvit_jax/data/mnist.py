"""python -m stvit_jax.data.mnist SOURCE FOLDER: MNIST's file format to class folders of PNG files.

SOURCE holds `train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz` and the same with `t10k`, as
MNIST, Fashion-MNIST and their kin are published; FOLDER gets `train/` and `val/`, for
`data.source=folder`.
"""

import argparse
import gzip
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from stvit_jax.console import say
from stvit_jax.errors import UserError, reason

SPLITS = {"train": "train", "t10k": "val"}


def write_folders(source: Path, folder: Path) -> None:
    """Writes every image of `source` to `folder/SPLIT/LABEL/NUMBER.png`.

    Raises:
      UserError: a file of `source` is missing, damaged or not in the format; `folder` exists
        already, or cannot be written.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already: remove it, or write to another folder")
    data = {
        split: (
            _read(source / f"{name}-images-idx3-ubyte.gz", 3),
            _read(source / f"{name}-labels-idx1-ubyte.gz", 1),
        )
        for name, split in SPLITS.items()
    }
    for split, (images, labels) in data.items():
        if len(images) != len(labels):
            raise UserError(f"{source}: {len(images)} images, but {len(labels)} labels ({split})")
    partial = folder.with_name(f"{folder.name}.partial")  # only a whole set gets the name
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for split, (images, labels) in data.items():
            for label in np.unique(labels):
                (partial / split / str(label)).mkdir(parents=True)
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                Image.fromarray(image).save(partial / split / str(label) / f"{number:05}.png")
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {reason(error)}") from error
    for split, (images, _) in data.items():
        say(f"{folder / split}: {len(images)} images")


def _read(path: Path, dimensions: int) -> np.ndarray:
    """uint8: two zero bytes, the type (8: uint8), the dimensions, their sizes, the values."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {reason}") from error
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes((0, 0, 8, dimensions)):
        raise UserError(f"{path} is no idx file of uint8 with {dimensions} dimensions")
    shape = np.frombuffer(data[:header], ">u4", offset=4)
    values = np.frombuffer(data, np.uint8, offset=header)
    if len(values) != np.prod(shape, dtype=np.int64):
        raise UserError(f"{path} holds {len(values)} values, not {' x '.join(map(str, shape))}")
    return values.reshape(shape)


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
      UserError: as `write_folders`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m stvit_jax.data.mnist", description=__doc__.splitlines()[0]
    )
    parser.add_argument("source", type=Path, help="the folder of the four published files")
    parser.add_argument("folder", type=Path, help="to write, for data.source=folder")
    arguments = parser.parse_args(argv)
    write_folders(arguments.source, arguments.folder)


if __name__ == "__main__":
    from stvit_jax.command_line import entry

    entry(main)
