"""From uint8 pixels to what the network takes.

One definition for training (on the device), evaluation and prediction. It uses operators alone, so
it takes NumPy and JAX arrays alike, and loader workers can import it without importing JAX.
"""

from typing import Any

import numpy as np

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, per channel, for pixels in 0..1
STD = (0.229, 0.224, 0.225)


def normalize(images: Any) -> Any:
    """`(images / 255 - MEAN) / STD` in float32.

    `images` is uint8, `(..., 3)` in RGB order, a NumPy or a JAX array; the result has its shape and
    is an array of the same library.
    """
    mean, std = np.asarray(MEAN, np.float32), np.asarray(STD, np.float32)
    return (images.astype(np.float32) / np.float32(255) - mean) / std
