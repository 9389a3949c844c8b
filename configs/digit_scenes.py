"""The embedded default of segmentation: UPerNet on a small STViT, scenes of handwritten digits.

    python train.py --config configs/digit_scenes.py --workdir runs/scenes

Needs nothing but the requirements: scenes of 64 x 64 pixels, of overlapping digits that
scikit-learn ships, are composed on first use; the background is a class, too.

| hardware | time | mIoU | aAcc |
| --- | --- | --- | --- |
| 2 CPU cores, busy | 5.2 minutes | 78.6 | 96.3 |
"""

from ml_collections import ConfigDict

from stvit_jax.config import base


def get_config() -> ConfigDict:
    config = base()
    config.task = "segmentation"
    config.model.name = "stvit_tiny"
    config.model.embed_dim = (16, 32, 64, 64)
    config.model.depths = (1, 1, 1, 1)
    config.model.num_heads = (1, 2, 4, 4)
    config.segmentation.channels = 48
    config.image_size = 64
    config.segmentation.long_side = 64
    config.segmentation.short_side = 64
    config.segmentation.scale_range = (0.9, 1.15)
    config.segmentation.largest_class = 1.0
    config.segmentation.photometric = False  # digits and grounds have all colours as they are
    config.data.source = "digit_scenes"
    config.data.name = "digit scenes"
    config.data.workers = 1
    config.data.repeats = 1
    config.data.flip = False  # a mirrored digit is no digit

    config.batch_size = 16
    config.group_size = 0
    config.schedule = "poly"
    config.total_steps = 1400
    config.warmup_steps = 50
    config.learning_rate = 512 / 16 * 5e-3  # 5e-3 for 16 scenes
    config.min_learning_rate = 0.0
    config.weight_decay = 0.05
    config.ema_decay = 0.0
    config.dtype = "float32"

    config.log_every = 50
    config.eval_every_steps = 700
    config.checkpoint_every = 200
    config.lock()
    return config
