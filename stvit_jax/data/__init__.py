"""Images in: sources, order, host-side decoding, loading. Nothing here knows the network.

Names are imported on first use: what only normalises on a device needs no image library.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["eval_image", "normalize"]

if TYPE_CHECKING:  # what editors and type checkers see
    from stvit_jax.data.decode import eval_image
    from stvit_jax.data.normalization import normalize


def __getattr__(name: str) -> Any:
    if name == "eval_image":
        from stvit_jax.data.decode import eval_image

        return eval_image
    if name == "normalize":
        from stvit_jax.data.normalization import normalize

        return normalize
    raise AttributeError(f"module 'stvit_jax.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
