"""Arrays in, arrays out; no Flax."""

from stvit_jax.ops import resize

__all__ = ["resize"]
