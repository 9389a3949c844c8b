"""STViT, the Vision Transformer with Super Token Sampling (CVPR 2023, arXiv 2211.11167), in JAX.

Names are imported on first use, so that `stvit_jax.training.signals` can be in place before
anything heavy is loaded, and data-loading workers never import JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "UserError": "errors",
    "create_model": "models.stvit",
    "create_segmenter": "models.segmenter",
    "fold_batch_norm": "models.fold",
    "from_pretrained": "checkpoints.pretrained",
    "list_models": "models.stvit",
    "load_weights": "checkpoints.fit",
    "save_pretrained": "checkpoints.pretrained",
}
_MODULES = ("augment", "data", "ops", "schedules", "torch_weights")
__all__ = [
    "UserError",
    "augment",
    "create_model",
    "create_segmenter",
    "data",
    "fold_batch_norm",
    "from_pretrained",
    "list_models",
    "load_weights",
    "ops",
    "save_pretrained",
    "schedules",
    "torch_weights",
]

if TYPE_CHECKING:  # what editors and type checkers see
    from stvit_jax import augment, data, ops, schedules, torch_weights
    from stvit_jax.checkpoints.fit import load_weights
    from stvit_jax.checkpoints.pretrained import from_pretrained, save_pretrained
    from stvit_jax.errors import UserError
    from stvit_jax.models.fold import fold_batch_norm
    from stvit_jax.models.segmenter import create_segmenter
    from stvit_jax.models.stvit import create_model, list_models


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"stvit_jax.{_EXPORTS[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"stvit_jax.{name}")
    raise AttributeError(f"module 'stvit_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
