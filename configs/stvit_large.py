"""The published recipe of stvit_large for ImageNet-1k: 300 epochs at 224, with :384 fine-tuning.

Prepare the data once: start the command, and the error says how. Class folders work as well, with
`--config.data.source=folder` and `--config.data.dir` the folder that holds train/ and val/.

Train:
    python train.py --config configs/stvit_large.py --workdir runs/stvit_large
Fine-tune at 384, 30 epochs, batch-norm statistics frozen:
    python train.py --config configs/stvit_large.py:384 --workdir runs/stvit_large_384 \
        --config.init_from=runs/stvit_large
Evaluate released or own weights, at 224 and at 384:
    python train.py --config configs/stvit_large.py --workdir runs/eval_large \
        --config.eval_only=True --config.init_from=WEIGHTS
    python train.py --config configs/stvit_large.py:384 --workdir runs/eval_large_384 \
        --config.eval_only=True --config.init_from=WEIGHTS_384

Drop path is 0.4, and 0.6 for the last 40 epochs: the authors report that as better than 0.6
throughout (`--config.model.drop_path_rate=0.6 '--config.drop_path_schedule=()'`).

| recipe | hardware | time | top-1 | top-1 in the paper |
| --- | --- | --- | --- | --- |
| 224 | - | - | - | 85.3 |
| 384 | - | - | - | 86.4 |
"""

from ml_collections import ConfigDict

from stvit_jax.recipes import imagenet


def get_config(arg: str = "") -> ConfigDict:
    config = imagenet(arg)
    config.model.name = "stvit_large"
    config.model.drop_path_rate = 0.4
    config.drop_path_schedule = ((260, 0.6),) if arg == "" else ()
    config.lock()
    return config
