"""Nearest neighbours of images, as a picture: what a network finds alike.

    python -m examples.embed --weights PATH FOLDER --output PNG

PATH is weights of any form that train.py's init_from takes. The first images of FOLDER are looked
up among all of it, by the angle between their pooled features.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import stvit_jax
from stvit_jax import command_line, figures
from stvit_jax.checkpoints.trained import Trained, load_trained
from stvit_jax.console import say, warn
from stvit_jax.data import pictures
from stvit_jax.data.decode import UnreadableImage
from stvit_jax.data.sources.scan import LeftOut
from stvit_jax.errors import UserError

QUERIES, NEIGHBOURS = 8, 7
TILE, GAP = 96, 4
BATCH = 32


def read(folder: str, image_size: int) -> np.ndarray:
    """Crops, uint8 (N, S, S, 3), of the pictures below a folder; what is none is said.

    Raises:
      UserError: fewer than two can be read.
    """
    left_out = LeftOut()
    paths = pictures.find([folder], left_out)
    batches = pictures.crops(paths, image_size, BATCH)
    found = []
    for path, crop in zip(paths, (crop for batch in batches for crop in batch), strict=True):
        if isinstance(crop, UnreadableImage):
            warn(f"{path} cannot be read: {crop}")
        else:
            found.append(crop)
    if left_out:
        say(f"left out: {left_out}")
    if len(found) < 2:
        raise UserError(f"{folder} holds {len(found)} pictures that can be read: neighbours need 2")
    return np.stack(found)


def embed(trained: Trained, crops: np.ndarray) -> np.ndarray:
    """Features of unit length, (N, projection), of uint8 crops (N, S, S, 3)."""
    model, variables = stvit_jax.fold_batch_norm(trained.model, trained.variables)

    @jax.jit
    def features(images: jax.Array) -> jax.Array:
        x = model.apply(variables, stvit_jax.data.normalize(images), method="features")
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    # The last batch is filled up, so that one program does for all.
    padded = np.concatenate([crops, np.zeros((-len(crops) % BATCH, *crops.shape[1:]), np.uint8)])
    parts = [features(padded[i : i + BATCH]) for i in range(0, len(padded), BATCH)]
    return np.concatenate(parts)[: len(crops)]


def sheet(crops: np.ndarray, features: np.ndarray) -> np.ndarray:
    """A row for each of the first images: itself, and its nearest neighbours."""
    nearest = np.argsort(-(features[:QUERIES] @ features.T), axis=1)[:, : NEIGHBOURS + 1]
    step = TILE + GAP
    picture = Image.new("RGB", (nearest.shape[1] * step, nearest.shape[0] * step), "white")
    for row, found in enumerate(nearest):
        for column, i in enumerate(found):
            tile = Image.fromarray(crops[i]).resize((TILE, TILE))
            picture.paste(tile, (column * step, row * step))
    return np.asarray(picture)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = command_line.parser("python -m examples.embed", __doc__)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--weights", metavar="PATH", required=True)
    parser.add_argument("--output", metavar="PNG", required=True)
    known = parser.parse_args(argv)
    output = figures.output("--output", known.output, forms=(".png",))
    trained = load_trained(known.weights)
    if trained.is_segmenter:
        raise UserError(f"{known.weights} is of a segmenter: embed takes a classifier")
    crops = read(known.folder, trained.image_size)
    output.write_bytes(figures.png(sheet(crops, embed(trained, crops))))
    say(f"{output}: neighbours among {len(crops)} images")


if __name__ == "__main__":
    command_line.entry(main)
