"""python -m stvit_jax.data.idx SOURCE FOLDER: MNIST's file format to class folders of PNG files.

SOURCE holds `train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz` and the same with `t10k`, as
MNIST, Fashion-MNIST and their kin are published; FOLDER gets `train/` and `val/`, for
`data.source=folder`.
"""

import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from stvit_jax.errors import UserError

SPLITS = {"train": "train", "t10k": "val"}


def write_folders(source: Path, folder: Path) -> None:
    """Writes every image of `source` to `folder/SPLIT/LABEL/NUMBER.png`.

    Raises:
      UserError: a file of `source` is missing or not in the format, or `folder` exists already.
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
        for label in np.unique(labels):
            (folder / split / str(label)).mkdir(parents=True)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(folder / split / str(label) / f"{number:05}.png")
        print(f"{folder / split}: {len(images)} images", flush=True)


def _read(path: Path, dimensions: int) -> np.ndarray:
    """uint8: two zero bytes, the type (8: uint8), the dimensions, their sizes, the values."""
    try:
        data = gzip.decompress(path.read_bytes())
    except OSError as error:  # gzip's own error is one, too
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if data[:4] != bytes((0, 0, 8, dimensions)):
        raise UserError(f"{path} is no idx file of uint8 with {dimensions} dimensions")
    shape = np.frombuffer(data, ">u4", dimensions, offset=4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
    if len(values) != np.prod(shape):
        raise UserError(f"{path} holds {len(values)} values, not {' x '.join(map(str, shape))}")
    return values.reshape(shape)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        write_folders(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        sys.exit(f"error: {error}")
