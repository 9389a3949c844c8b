"""How deep in the network a parameter lies, and how fast it learns in fine-tuning.

Layer-wise decay as BEiT and timm have it: the learning rate of layer i of L is that of the last
times `decay ** (L - i)`. Here layer 0 is the stem, every block is one, a downsampling belongs to
the block before it, and what follows the stages is the last.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax

from stvit_jax.trees import path_name


def layer_of(name: str, depths: Sequence[int]) -> int:
    """The layer of a parameter, 0 to sum(depths) + 1.

    Args:
      name: its path in `params`, as `layers_0/blocks_1/norm1/scale`.
      depths: blocks of each stage.
    """
    if name.startswith("patch_embed/"):
        return 0
    if not (found := re.match(r"layers_(\d+)/(?:blocks_(\d+)|downsample)/", name)):
        return sum(depths) + 1
    stage, block = int(found[1]), found[2]
    return sum(depths[:stage]) + (int(block) + 1 if block else depths[stage])


def multipliers(
    params: Any,
    depths: Sequence[int],
    *,
    layer_decay: float = 1.0,
    freeze_stages: int = 0,
    linear_probe: bool = False,
) -> Any:
    """What the learning rate of every parameter is multiplied with; 0: it is frozen.

    Args:
      params: of an STViT.
      depths: blocks of each stage.
      layer_decay: of the learning rate, by layer; 1: none.
      freeze_stages: how many stages stay as they are, and the stem with them; 0: none, nor it.
      linear_probe: whether the classifier alone learns.
    """
    last = sum(depths) + 1
    frozen = sum(depths[:freeze_stages])  # the last layer that stays

    def multiplier(path: Any, _: Any) -> float:
        name = path_name(path)
        layer = layer_of(name, depths)
        if (linear_probe and not name.startswith("head/")) or (freeze_stages and layer <= frozen):
            return 0.0
        return layer_decay ** (last - layer)

    return jax.tree_util.tree_map_with_path(multiplier, params)
