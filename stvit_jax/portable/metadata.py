"""What the user of an exported network has to know: pictures in, classes out."""

from typing import Any

from stvit_jax.checkpoints.trained import Trained
from stvit_jax.data.class_lists import of_network
from stvit_jax.data.decode import short_side
from stvit_jax.data.imagenet_names import display_names
from stvit_jax.data.normalization import MEAN, STD


def metadata(trained: Trained, image_size: int) -> dict[str, Any]:
    """Plain values, as JSON has them.

    Args:
      trained: a classifier, or a segmenter.
      image_size: side of the crops in pixels.
    """
    count = trained.model.num_classes
    if trained.is_segmenter:
        names, colours = of_network(trained.classes, count)
        shape = ["batch", image_size, image_size, count]
        own = {
            "output": {"dtype": "float32", "shape": shape, "meaning": "logits per pixel"},
            "classes": names,
            "palette": colours.tolist(),
        }
        cut = {
            "resize_short_side": image_size,
            "interpolation": "bilinear",
            "antialias": False,
            "windows": image_size,  # logits are averaged where they overlap
            "stride": max(1, image_size * 2 // 3),
        }
    else:
        own = {
            "output": {"dtype": "float32", "shape": ["batch", count]},
            "classes": display_names(trained.classes, count),
        }
        cut = {
            "resize_short_side": short_side(image_size),  # None: resize to the square
            "interpolation": "bicubic",
            "antialias": True,
            "centre_crop": image_size,
        }
    return {
        "input": {
            "dtype": "uint8",
            "shape": ["batch", image_size, image_size, 3],
            "channels": "RGB",
        },
        **own,
        "preprocessing": {
            **cut,
            "normalisation": "inside: (pixels / 255 - mean) / std",
            "mean": MEAN,
            "std": STD,
        },
        "network": trained.settings,
        "weights": trained.source.name,
    }
