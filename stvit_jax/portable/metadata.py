"""What the user of an exported network has to know: pictures in, classes out."""

from typing import Any

from stvit_jax.checkpoints.trained import Trained
from stvit_jax.data.decode import short_side
from stvit_jax.data.imagenet_names import display_names
from stvit_jax.data.normalization import MEAN, STD


def metadata(trained: Trained, image_size: int) -> dict[str, Any]:
    """Plain values, as JSON has them.

    Args:
      trained: a classifier.
      image_size: side of the crops in pixels.
    """
    return {
        "input": {
            "dtype": "uint8",
            "shape": ["batch", image_size, image_size, 3],
            "channels": "RGB",
        },
        "output": {"dtype": "float32", "shape": ["batch", trained.model.num_classes]},
        "preprocessing": {
            "resize_short_side": short_side(image_size),  # None: resize to the square
            "interpolation": "bicubic",
            "antialias": True,
            "centre_crop": image_size,
            "normalisation": "inside: (pixels / 255 - mean) / std",
            "mean": MEAN,
            "std": STD,
        },
        "classes": display_names(trained.classes, trained.model.num_classes),
        "network": trained.settings,
        "weights": trained.source.name,
    }
