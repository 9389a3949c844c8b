"""From uint8 pixels to what the network takes.

One definition for training (on the device), evaluation and prediction. It uses operators alone, so
it takes NumPy and JAX arrays alike, and loader workers can import it without importing JAX.
"""

from typing import Any

import numpy as np

from stvit_jax.errors import UserError, kind_of

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, per channel, for pixels in 0..1
STD = (0.229, 0.224, 0.225)


def normalize(images: Any) -> Any:
    """`(images / 255 - MEAN) / STD` in float32.

    Args:
      images: whole numbers in 0..255, `(..., 3)` in RGB order, a NumPy or a JAX array.

    Returns:
      An array of the same shape and library.

    Raises:
      UserError: anything else, such as floats, which may be normalised already.
    """
    shape, dtype = getattr(images, "shape", ()), getattr(images, "dtype", None)
    if not (isinstance(dtype, np.dtype) and dtype.kind in "iu" and shape and shape[-1] == 3):
        raise UserError(
            f"images are {kind_of(images)}; normalize takes pixels in 0..255, uint8 (..., 3), as a "
            "NumPy or JAX array"
        )
    mean, std = np.asarray(MEAN, np.float32), np.asarray(STD, np.float32)
    return (images.astype(np.float32) / np.float32(255) - mean) / std
