"""Nearest neighbours of images, as a picture: what a network finds alike.

    python -m examples.embed --weights PATH FOLDER --output PNG

PATH is weights of any form that train.py's init_from takes. The first images of FOLDER are looked
up among all of it, by the angle between their pooled features.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import stvit_jax
from stvit_jax.checkpoints.trained import Trained, load_trained

QUERIES, NEIGHBOURS = 8, 7
TILE, GAP = 96, 4
BATCH = 32
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


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


def sheet(crops: np.ndarray, features: np.ndarray) -> Image.Image:
    """A row for each of the first images: itself, and its nearest neighbours."""
    nearest = np.argsort(-(features[:QUERIES] @ features.T), axis=1)[:, : NEIGHBOURS + 1]
    step = TILE + GAP
    picture = Image.new("RGB", (nearest.shape[1] * step, nearest.shape[0] * step), "white")
    for row, found in enumerate(nearest):
        for column, i in enumerate(found):
            tile = Image.fromarray(crops[i]).resize((TILE, TILE))
            picture.paste(tile, (column * step, row * step))
    return picture


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", required=True)
    known = parser.parse_args(argv)
    trained = load_trained(known.weights)
    files = sorted(p for p in known.folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    crops = np.stack([stvit_jax.data.eval_image(p.read_bytes(), trained.image_size) for p in files])
    sheet(crops, embed(trained, crops)).save(known.output)
    print(f"{known.output}: neighbours among {len(files)} images")


if __name__ == "__main__":
    main()
