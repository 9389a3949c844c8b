"""stvit_small on CIFAR-100 at 32 pixels, from scratch.

    python train.py --config configs/cifar100.py --workdir runs/cifar100

Prepare the data once: the first start says how (tfds downloads 160 MB).
Up to 32 pixels the recipe crops from four pixels of padding instead of resizing. The stem's stride
of 4 leaves 8x8 tokens, then 4x4, 2x2 and 1x1, so super tokens are 4 and 2 tokens wide: a grid of
2x2 cells in both sampled stages. With ImageNet's 8 and 4 there would be one cell, and attention
over one super token. The run has 29,100 steps, a thirteenth of ImageNet's, and the moving average
is shorter accordingly. The rest is the ImageNet recipe. The paper has no figure for it.

| hardware | time | top-1 |
| --- | --- | --- |
| - | - | - |
"""

from ml_collections import ConfigDict

from stvit_jax.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.stoken_size = (4, 2, 1, 1)
    config.model.drop_path_rate = 0.1
    config.image_size = 32
    config.data.name = "cifar100"
    config.batch_size = 512
    config.ema_decay = 0.9995
    config.eval_every_epochs = 10
    config.lock()
    return config
