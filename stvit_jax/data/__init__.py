"""Images in: sources, order, host-side decoding, loading. Nothing here knows the network."""

from stvit_jax.data.decode import eval_image
from stvit_jax.data.normalization import normalize

__all__ = ["eval_image", "normalize"]
