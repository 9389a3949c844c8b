"""stvit_small on iNaturalist 2018 (8,142 species) at 224, by the ImageNet recipe.

    python train.py --config configs/inat2018.py --workdir runs/inat2018 \
        --config.init_from=runs/stvit_small

Prepare the data once: the first start says how (tfds downloads 120 GB). Without `init_from` it
trains from scratch; with ImageNet weights the head, of another class count, starts anew. The
paper has no figure for it.

| hardware | time | top-1 |
| --- | --- | --- |
| - | - | - |
"""

from ml_collections import ConfigDict

from stvit_jax.config import base


def get_config() -> ConfigDict:
    config = base()
    config.model.drop_path_rate = 0.1
    config.data.name = "i_naturalist2018"
    config.lock()
    return config
