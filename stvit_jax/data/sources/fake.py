"""Random pictures and scenes for benchmarks."""

import io
from typing import Any

import numpy as np
from PIL import Image

from stvit_jax.data import class_lists
from stvit_jax.data.sources import Source

TRAIN, EVAL, CLASSES = 1_281_167, 1_000, 1_000
SCENES = {True: 20_210, False: 2_000}  # by whether it is to train on
PICTURES, SIZE, SCENE_SIZE = 16, (500, 375), (512, 512)


class FakeSource(Source):
    """Random pictures: as many as ImageNet, of its usual size, as JPEG.

    A few pictures are drawn (smooth shapes and grain, about as large as ImageNet's files) and
    encoded once, and then repeat. A label has nothing to do with its picture.
    """

    name = "fake pictures"
    class_names = tuple(f"fake{label}" for label in range(CLASSES))

    def __init__(self, size: int, pixels: tuple[int, int] = SIZE) -> None:
        self._size = size
        self._pictures: list[bytes] = []
        rng = np.random.Generator(np.random.Philox(key=0))
        for _ in range(PICTURES):
            shapes = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
            grain = rng.normal(0, 10, (*pixels[::-1], 3))
            picture = np.asarray(shapes.resize(pixels, Image.Resampling.BICUBIC)) + grain
            file = io.BytesIO()
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
            self._pictures.append(file.getvalue())

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._pictures[index % PICTURES], "label": index % CLASSES}

    def where(self, index: int) -> str:
        return f"fake picture {index % PICTURES}"


class FakeScenes(FakeSource):
    """Random scenes: as many as ADE20K, with its classes, in blocks that no picture knows of.

    Attributes:
      palette: uint8 (K, 3), RGB, the colour of every class in pictures.
    """

    name = "fake scenes"
    class_names, palette = class_lists.ade20k()

    def __init__(self, size: int) -> None:
        super().__init__(size, SCENE_SIZE)
        self._annotations: list[bytes] = []
        rng = np.random.Generator(np.random.Philox(key=1))
        for _ in range(PICTURES):
            blocks = Image.fromarray(rng.integers(0, self.num_classes + 1, (6, 8), np.uint8))
            file = io.BytesIO()
            blocks.resize(SCENE_SIZE, Image.Resampling.NEAREST).save(file, "PNG")
            self._annotations.append(file.getvalue())

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, annotation = self._pictures[index % PICTURES], self._annotations[index % PICTURES]
        return {"image": image, "annotation": annotation}

    def sizes(self) -> np.ndarray:
        """Height and width of every scene: int32 (N, 2)."""
        return np.full((len(self), 2), SCENE_SIZE[::-1], np.int32)


def open_fake(*, train: bool) -> FakeSource:
    """The pictures to train on, or those to evaluate on."""
    return FakeSource(TRAIN if train else EVAL)
