"""Fine-tuning on one's own class folders, from trained weights of any form.

    python train.py --config configs/finetune.py --workdir W --config.data.dir=D
        --config.init_from=F

The network, its settings and the size of the pictures are those of the weights F; classes are the
folders of D/train. docs/finetuning.md has the layouts that are known.

Short, and the same for fifty pictures and for fifty thousand: statistics of BatchNorm stay those of
F, so that batches may be small and odd; early layers learn slower than late ones; no mixup.
The best evaluation's checkpoint is kept, and at the end there are `confusion.png` and
`per_class.json`. With thousands of pictures fewer epochs do: --config.epochs=10.

Digits turned by a quarter, 20 of each to train on and 30 to evaluate, from `runs/digits`:

| learned | hardware | time | top-1 raw | top-1 EMA |
| --- | --- | --- | --- | --- |
| all | 2 CPU cores, busy | 3.5 minutes | 68.3 | 65.7 |
| `linear_probe` | 2 CPU cores, busy | 2 minutes | 34.0 | 30.3 |
"""

from ml_collections import ConfigDict

from stvit_jax.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.name = ""
    config.image_size = 0
    config.data.source = "folder"
    config.data.name = "my folder"  # in messages
    config.data.workers = 2
    config.data.repeats = 1

    config.augment.erasing_probability = 0.0
    config.augment.mixup = False

    config.batch_size = 32
    config.group_size = 0
    config.freeze_batch_norm = True
    config.layer_decay = 0.8
    config.epochs = 40
    config.warmup_epochs = 2
    config.learning_rate = 8e-3
    config.min_learning_rate = 1e-6
    config.ema_decay = 0.98
    config.dtype = "float32"

    config.log_every = 10
    config.eval_every_epochs = 5
    config.checkpoint_every = 200
    config.checkpoint_best = True
    config.lock()
    return config
