"""One comparison of a network with its peer: what is run, and on which numbers."""

import dataclasses
from typing import Any

import jax
import numpy as np

from stvit_jax.config import base
from stvit_jax.models.settings import abstract
from stvit_jax.models.stvit import STViT

RECIPE = base()  # as published: weight decay, moving average, learning rate


@dataclasses.dataclass(frozen=True)
class Case:
    """What both sides run.

    Attributes:
      model: the network's name.
      mode: train or infer.
      image_size: pixels, square.
      batch_size: images.
      dtype: of compute, bfloat16 or float32.
      drop_path: rate of the last block, that of stvit_small; any but 0 costs the same.
    """

    model: str
    mode: str
    image_size: int
    batch_size: int
    dtype: str
    drop_path: float = 0.1

    @property
    def learning_rate(self) -> float:
        return RECIPE.learning_rate * self.batch_size / 512

    def describe(self) -> str:
        """In words."""
        return (
            f"{self.model} {self.mode}, {self.batch_size} images at {self.image_size} in "
            f"{self.dtype}"
        )


def variables_of(model: STViT) -> dict[str, Any]:
    """Random weights with non-trivial statistics and scales, so that every layer shows."""
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        if name == "count":
            return np.zeros(leaf.shape, leaf.dtype)
        if name in ("scale", "var", "gamma_1", "gamma_2"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        fan_in = np.prod(leaf.shape[:-1]) if name == "kernel" else 100
        return rng.normal(0, fan_in**-0.5, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract(model))


def batch_of(case: Case, model: STViT) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images (B, H, W, 3) and smoothed labels (B, K), float32."""
    rng = np.random.default_rng(1)
    shape = (case.batch_size, case.image_size, case.image_size, model.in_chans)
    images = rng.standard_normal(shape, np.float32)
    labels = rng.integers(0, model.num_classes, case.batch_size)
    smoothing = RECIPE.label_smoothing
    targets = np.full((case.batch_size, model.num_classes), smoothing / model.num_classes)
    targets[np.arange(case.batch_size), labels] += 1 - smoothing
    return images, targets.astype(np.float32)
