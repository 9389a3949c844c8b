"""UPerNet on stvit_large for ADE20K, 160,000 steps; with :fpn Semantic FPN, 80,000.

Get ADEChallengeData2016 and its annotations; D is the folder that holds images/ and annotations/.
W are weights of classification: released ones, or a run's workdir.

Train:
    python train.py --config configs/upernet_large.py --workdir runs/upernet_large \
        --config.data.dir=D --config.init_from=W
Test at six scales and mirrored, as the papers' second numbers are:
    python train.py --config configs/upernet_large.py --workdir runs/upernet_large \
        --config.data.dir=D --config.eval_only=True --config.segmentation.test_flip=True \
        "--config.segmentation.test_scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75)"

The backbone has the super tokens it was trained with, (8, 4, 1, 1). Coarser ones need less memory:
"--config.model.stoken_size=(16, 8, 2, 1)". docs/segmentation.md has the recipe and its sources.

| head | super tokens | test | hardware | time | mIoU | mIoU in the paper |
| --- | --- | --- | --- | --- | --- | --- |
| UPerNet, 160k | 8 4 1 1 | whole, one scale | - | - | - | - |
| UPerNet, 160k | 8 4 1 1 | six scales, mirrored | - | - | - | - |
| UPerNet, 160k | 16 8 2 1 | whole, one scale | - | - | - | - |
| Semantic FPN, 80k | 8 4 1 1 | whole, one scale | - | - | - | - |
"""

from ml_collections import ConfigDict

from stvit_jax.recipes import ade20k


def get_config(arg: str = "") -> ConfigDict:
    config = ade20k(arg)
    config.model.name = "stvit_large"
    config.model.drop_path_rate = 0.5
    config.lock()
    return config
