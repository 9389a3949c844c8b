"""The published recipe of stvit_base for ImageNet-1k: 300 epochs at 224, with :384 fine-tuning.

Prepare the data once: start the command, and the error says how. Class folders work as well, with
`--config.data.source=folder` and `--config.data.dir` the folder that holds train/ and val/.

Train:
    python train.py --config configs/stvit_base.py --workdir runs/stvit_base
Fine-tune at 384, 30 epochs, batch-norm statistics frozen:
    python train.py --config configs/stvit_base.py:384 --workdir runs/stvit_base_384 \
        --config.init_from=runs/stvit_base
Evaluate released or own weights, at 224 and at 384:
    python train.py --config configs/stvit_base.py --workdir runs/eval_base \
        --config.eval_only=True --config.init_from=WEIGHTS
    python train.py --config configs/stvit_base.py:384 --workdir runs/eval_base_384 \
        --config.eval_only=True --config.init_from=WEIGHTS_384

| recipe | hardware | time | top-1 | top-1 in the paper |
| --- | --- | --- | --- | --- |
| 224 | - | - | - | 84.8 |
| 384 | - | - | - | 86.0 |
"""

from ml_collections import ConfigDict

from stvit_jax.recipes import imagenet


def get_config(arg: str = "") -> ConfigDict:
    config = imagenet(arg)
    config.model.name = "stvit_base"
    config.model.drop_path_rate = 0.4
    config.lock()
    return config
