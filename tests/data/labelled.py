"""Examples as tests load them; in a file of its own, which loader workers import."""

from functools import partial
from typing import Any

import numpy as np

from stvit_jax.data.decode import eval_image, train_image
from stvit_jax.data.examples import Examples
from stvit_jax.data.sources import Source

SIZE = 16


def examples(source: Source) -> Examples:
    """Images of SIZE pixels, half of them mirrored in training, and their labels."""
    spec = {"image": ((SIZE, SIZE, 3), np.uint8), "label": ((), np.int32)}
    return Examples(source, partial(load, image_size=SIZE), spec)


def load(
    features: dict[str, Any], rng: np.random.Generator | None, *, image_size: int
) -> dict[str, Any]:
    """An example of `examples`."""
    data = features["image"]
    if rng is None:
        image = eval_image(data, image_size)
    else:
        image = train_image(data, image_size, rng, True)
    return {"image": image, "label": features["label"]}
