"""The published recipes, as configs that a file in `configs/` completes and locks."""

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


def ade20k(arg: str) -> ConfigDict:
    """Semantic segmentation on ADE20K at 512 x 512, not locked; drop path is the backbone's.

    Those of the papers (mmsegmentation 0.x), with what is named alike there: UPerNet as of Swin and
    its kin, Semantic FPN as of PVT and its kin.

    Args:
      arg: "" for UPerNet, 160,000 steps; "fpn" for Semantic FPN, 80,000.

    Raises:
      UserError: any other argument.
    """
    if arg not in ("", "fpn"):
        raise UserError(
            f"config argument {arg!r} is unknown: write configs/NAME.py (UPerNet) or "
            "configs/NAME.py:fpn (Semantic FPN)"
        )
    config = base()
    config.task = "segmentation"
    config.segmentation.head = arg or "upernet"
    config.image_size = 512
    config.data.source = "ade20k"
    config.data.name = "ADE20K"
    config.data.repeats = 1

    config.batch_size = 16
    config.group_size = 0
    config.schedule = "poly"
    config.learning_rate = 512 / 16 * 6e-5  # 6e-5 for 16 images
    config.min_learning_rate = 0.0
    config.weight_decay = 0.01
    config.total_steps = 160_000
    config.warmup_steps = 1500
    config.decay = "mmseg"
    config.eval_every_steps = 16_000
    if arg:
        config.learning_rate = 512 / 16 * 1e-4
        config.min_learning_rate = 1e-6
        config.weight_decay = 1e-4
        config.poly_power = 0.9
        config.total_steps = 80_000
        config.warmup_steps = 0
        config.decay = "all"
        config.eval_every_steps = 8_000
    config.ema_decay = 0.0  # as published: none
    return config
