"""A miniature ADE20K: generated pictures, with the layout and names of ADEChallengeData2016."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from stvit_jax.data.sources.scenes import ADE20K

# Values in the annotations, and what a class looks like; 0 is "other", which is ignored.
COLOURS = {
    0: (90, 90, 90),
    1: (200, 180, 150),  # wall
    3: (60, 130, 230),  # sky
    5: (30, 120, 40),  # tree
    13: (230, 60, 50),  # person
    21: (240, 210, 40),  # car
}
SIZES = ((67, 91), (96, 64), (48, 48), (71, 130), (33, 41), (101, 59), (64, 64))  # height, width


def write(
    folder: Path,
    train: int = 8,
    val: int = 5,
    seed: int = 0,
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> Path:
    """Writes `train` and `val` pictures, of odd sizes, some of them upright, some small.

    Returns:
      the folder ADEChallengeData2016 within `folder`, for `data.dir` as is `folder` itself.
    """
    root = folder / ADE20K
    splits = (("training", "train", train), ("validation", "val", val))
    for number, (split, short, count) in enumerate(splits):
        images, annotations = root / "images" / split, root / "annotations" / split
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        for index in range(count):
            rng = np.random.default_rng([seed, number, index])
            picture, annotation = scene(*sizes[index % len(sizes)], rng)
            name = f"ADE_{short}_{index + 1:08}"
            Image.fromarray(picture).save(images / f"{name}.jpg", quality=95)
            Image.fromarray(annotation).save(annotations / f"{name}.png")
    return root


def scene(height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sky above a wall, and shapes before them: uint8 (H, W, 3), and its annotation (H, W)."""
    drawn = Image.new("L", (width, height), 1)
    draw = ImageDraw.Draw(drawn)
    draw.rectangle((0, 0, width, int(height * rng.uniform(0.3, 0.6))), fill=3)
    for value in rng.permutation([0, 5, 13, 21, 5, 13]):
        side = rng.uniform(0.2, 0.45, 2) * (width, height)
        left_top = rng.uniform(0, 1, 2) * ((width, height) - side)
        box = (*left_top.tolist(), *(left_top + side).tolist())
        (draw.ellipse if value in (5, 13) else draw.rectangle)(box, fill=int(value))
    annotation = np.array(drawn)
    table = np.zeros((256, 3))
    table[list(COLOURS)] = list(COLOURS.values())
    picture = table[annotation] + rng.normal(0, 6, (height, width, 3))
    return picture.clip(0, 255).astype(np.uint8), annotation
