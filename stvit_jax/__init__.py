"""STViT, the Vision Transformer with Super Token Sampling (CVPR 2023, arXiv 2211.11167), in JAX.

Names are imported on first use, so that `stvit_jax.signals` can be in place before anything heavy
is loaded, and data-loading workers never import JAX.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {"create_model": "model", "list_models": "model", "load_weights": "weights"}
_MODULES = ("augment", "data", "schedules", "torch_weights")
__all__ = [*_EXPORTS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"stvit_jax.{_EXPORTS[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"stvit_jax.{name}")
    raise AttributeError(f"module 'stvit_jax' has no attribute {name!r}")
