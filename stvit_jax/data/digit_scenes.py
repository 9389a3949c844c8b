"""The set of segmentation's embedded default run: scenes of the digits that scikit-learn ships.

64 x 64 pixels: bright digits, about four times enlarged, on a dark ground of changing colour,
one over another here and there. The classes are the ground and the ten digits; a border of one
pixel around every digit, where both mix, is ignored. What is evaluated on shows held-out digits,
the same as in `digits`. Files lie in the layout of `sources.scenes`.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from stvit_jax.console import say
from stvit_jax.data import digits
from stvit_jax.errors import UserError, one_line

CLASSES = ("background", *"0123456789")
SIZE = 64
SCENES = {"training": 2400, "validation": 150}
VERSION = "1.0.0"  # of the pictures: what changes them changes it

_DIGITS = (2, 3)  # from, to, a scene
_SIDE = (28, 36)  # pixels of a digit; on disk it has 8
_HIDDEN = 0.2  # of a digit, at most, under the next one
_TRIES = 20  # to find such a place; a digit without one is left out
_NOISE = 8  # levels


def prepare(data_dir: str = "") -> Path:
    """Writes the scenes where they are missing, and then says so in one line.

    Any number of processes may prepare at once: each writes beside the target and renames, so the
    first one wins and the others use its files.

    Args:
      data_dir: tfds data directory, made if needed; empty for tfds's own default.

    Returns:
      the folder of `images`, `annotations` and `classes.txt`.

    Raises:
      UserError: the directory cannot be written to, or is full.
    """
    from tensorflow_datasets.core import constants

    target = Path(data_dir or constants.DATA_DIR).expanduser() / "digit_scenes" / VERSION
    if target.exists():
        return target
    say(f"Writing the scenes of digits ({sum(SCENES.values())} pictures, once) to {target}")
    unfinished = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{VERSION}.incomplete", dir=target.parent))
        _write(unfinished)
        unfinished.chmod(target.parent.stat().st_mode)  # mkdtemp's is for this user alone
        unfinished.rename(target)
    except OSError as error:
        if not target.exists():  # else another process was faster
            raise UserError(
                f"cannot write the scenes of digits to {target} ({one_line(error)}): make room, or "
                "set data.dir to a directory that can be written"
            ) from error
    finally:
        if unfinished:
            shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _write(root: Path) -> None:
    from sklearn.datasets import load_digits  # takes seconds, and only the first run needs it

    every = load_digits()
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    parts = zip(SCENES.items(), digits.split(every.target), strict=True)
    for number, ((split, count), part) in enumerate(parts):
        images, target = every.images[part], every.target[part]
        folders = [root / kind / split for kind in ("images", "annotations")]
        for folder in folders:
            folder.mkdir(parents=True)
        for index in range(count):
            rng = np.random.Generator(np.random.Philox(key=[number, index]))
            scene = compose(images, target, rng)
            for folder, pixels in zip(folders, scene, strict=True):
                Image.fromarray(pixels).save(folder / f"scene_{index:04}.png")


def compose(
    images: np.ndarray, target: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One scene.

    Args:
      images: digits to choose from, (N, 8, 8), of 0 to 16.
      target: which digits they are, (N,).
      rng: source of every draw.

    Returns:
      uint8 (SIZE, SIZE, 3), RGB; and the annotation, uint8 (SIZE, SIZE): 0 ignored, 1 the ground,
      2 to 11 the digits.
    """
    corners = rng.integers(0, 80, (2, 2, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(corners).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    pixels = pixels.astype(np.float32)
    annotation = np.ones((SIZE, SIZE), np.uint8)
    owner = np.zeros((SIZE, SIZE), np.int64)  # the number of the digit that is on top, from 1 on
    drawn = [0]  # pixels of every digit, hidden ones too
    for _ in range(rng.integers(*_DIGITS, endpoint=True)):
        which = rng.integers(len(images))
        side = int(rng.integers(*_SIDE, endpoint=True))
        ink = Image.fromarray(images[which].astype(np.float32))
        ink = np.asarray(ink.resize((side, side), Image.Resampling.BICUBIC)) / 16
        opacity = np.zeros((SIZE, SIZE), np.float32)
        colour = rng.integers(150, 256, 3)
        colour[rng.integers(3)] = 255
        for _ in range(_TRIES):
            top, left = rng.integers(0, SIZE - side, 2, endpoint=True)
            opacity[:] = 0
            opacity[top : top + side, left : left + side] = (4 * ink - 1).clip(0, 1)
            inside = opacity >= 0.5
            around = _grown(inside)
            seen = np.bincount(owner[~around], minlength=len(drawn))
            if (seen[1:] >= (1 - _HIDDEN) * np.array(drawn[1:])).all():
                break
        else:
            continue
        pixels += opacity[..., None] * (colour - pixels)
        annotation[around] = 0
        annotation[inside] = 2 + target[which]
        owner[around] = 0
        owner[inside] = len(drawn)
        drawn.append(np.count_nonzero(inside))
    pixels += rng.normal(0, _NOISE, pixels.shape)
    return np.rint(pixels).clip(0, 255).astype(np.uint8), annotation


def _grown(mask: np.ndarray) -> np.ndarray:
    """A mask and the pixels beside, above and below it."""
    wide = np.pad(mask, 1)
    shifted = wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]
    return np.logical_or.reduce([mask, *shifted])
