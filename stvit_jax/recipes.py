"""The published ImageNet recipes that several files in `configs/` start from."""

from ml_collections import ConfigDict

from stvit_jax.config import base
from stvit_jax.errors import UserError


def imagenet(arg: str) -> ConfigDict:
    """The recipe that a config's argument (`configs/NAME.py:ARG`) stands for, not locked.

    Args:
      arg: "" for training at 224, "384" for fine-tuning at 384.

    Raises:
      UserError: any other argument.
    """
    if arg not in ("", "384"):
        raise UserError(
            f"config argument {arg!r} is unknown: write configs/NAME.py (training at 224) or "
            "configs/NAME.py:384 (fine-tuning at 384)"
        )
    config = base()
    if arg:
        config.image_size = 384
        config.epochs = 30
        config.batch_size = 512
        config.group_size = 64
        config.learning_rate = 5e-6
        config.min_learning_rate = 5e-6
        config.warmup_epochs = 0
        config.weight_decay = 1e-8
        config.freeze_batch_norm = True  # inference mode: drop path is off, too
    return config
