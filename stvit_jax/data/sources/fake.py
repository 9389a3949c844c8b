"""Random pictures for benchmarks."""

import io
from typing import Any

import numpy as np
from PIL import Image

from stvit_jax.data.sources import Source

TRAIN, EVAL, CLASSES = 1_281_167, 1_000, 1_000
PICTURES, SIZE = 16, (500, 375)


class FakeSource(Source):
    """Random pictures: as many as ImageNet, of its usual size, as JPEG.

    A few pictures are drawn (smooth shapes and grain, about as large as ImageNet's files) and
    encoded once, and then repeat. A label has nothing to do with its picture.
    """

    name = "fake pictures"
    class_names = tuple(f"fake{label}" for label in range(CLASSES))

    def __init__(self, size: int) -> None:
        self._size = size
        self._pictures: list[bytes] = []
        rng = np.random.Generator(np.random.Philox(key=0))
        for _ in range(PICTURES):
            shapes = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
            grain = rng.normal(0, 10, (*SIZE[::-1], 3))
            picture = np.asarray(shapes.resize(SIZE, Image.Resampling.BICUBIC)) + grain
            file = io.BytesIO()
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
            self._pictures.append(file.getvalue())

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._pictures[index % PICTURES], "label": index % CLASSES}

    def where(self, index: int) -> str:
        return f"fake picture {index % PICTURES}"


def open_fake(*, train: bool) -> FakeSource:
    """The pictures to train on, or those to evaluate on."""
    return FakeSource(TRAIN if train else EVAL)
