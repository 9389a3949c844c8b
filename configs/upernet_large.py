"""UPerNet on stvit_large for ADE20K, 160,000 steps; with :fpn Semantic FPN, 80,000.

Data, commands and what the rows mean are those of `upernet_small.py`.

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
