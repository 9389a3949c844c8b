"""stvit_tiny on Fashion-MNIST (60,000 grey pictures of clothes) at 32 pixels, the whole recipe.

    apt-get install dataset-fashion-mnist
    python -m stvit_jax.data.mnist /usr/share/datasets/fashion-mnist runs/data/fashion_mnist
    python train.py --config configs/fashion_mnist.py --workdir runs/fashion_mnist

The recipe's augmentation is complete: repeated augmentation, RandAugment, random erasing, mixup and
CutMix in groups of 128. The run is short, so the learning rate is higher and the moving average
shorter than ImageNet's. The paper has no figure for it.

| hardware | time | top-1 raw | top-1 EMA |
| --- | --- | --- | --- |
| 2 CPU cores | 45 minutes | 90.36 | 90.34 |
"""

from ml_collections import ConfigDict

from stvit_jax.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.name = "stvit_tiny"
    config.model.drop_path_rate = 0.05
    config.image_size = 32
    config.data.source = "folder"
    config.data.name = "fashion_mnist"  # in messages
    config.data.dir = "runs/data/fashion_mnist"
    config.data.workers = 1
    config.batch_size = 256
    config.epochs = 40
    config.warmup_epochs = 1
    config.learning_rate = 4e-3
    config.ema_decay = 0.999
    config.dtype = "float32"
    config.eval_every_epochs = 5
    config.checkpoint_every = 200
    config.lock()
    return config
