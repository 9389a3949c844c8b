"""Augmentation on the device: uint8 crops and labels in, network inputs and soft labels out.

RandAugment, normalisation, random erasing (Zhong et al., 2017), and per group of images mixup
(Zhang et al., 2017) or CutMix (Yun et al., 2019) with label smoothing, as in the published recipe.
Everything is a pure function of a key and the position in the global batch: fold the step into the
key, and values depend neither on the number of devices nor on where a run was resumed.

A *group* of `group_size` neighbouring images takes the place of a device of the published script:
each group has one draw of mixup or CutMix, and its partners come from the same group.

Shapes: B batch, G groups, H, W height and width, K classes.
"""

import jax
from jax.sharding import Mesh

from stvit_jax.augment import rand_augment
from stvit_jax.augment.erasing import random_erasing
from stvit_jax.augment.mix import mixup_cutmix, smooth_one_hot
from stvit_jax.augment.rand_augment import apply_op
from stvit_jax.data.normalization import normalize

__all__ = ["apply_op", "augment_batch"]


def augment_batch(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int,
    group_size: int = 0,
    randaugment: bool = True,
    erasing_probability: float = 0.25,
    mixup: bool = True,
    label_smoothing: float = 0.1,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What one training step sees of a batch; the defaults are the recipe.

    Args:
      key: of this step.
      images: uint8 (B, H, W, 3).
      labels: integers (B,).
      num_classes: K.
      group_size: images that share a draw of mixup or CutMix; 0: the whole batch.
      randaugment: whether there is any.
      erasing_probability: 0: none.
      mixup: whether there is any, CutMix included; labels are smoothed without it, too.
      label_smoothing: what the label gives away to all classes.
      mesh: over all of whose axes the batch is sharded, None for one device.

    Returns:
      Float32 images (B, H, W, 3), and soft labels (B, K).
    """
    rand_augment_key, erasing_key, mix_key = jax.random.split(key, 3)
    if randaugment:
        images = rand_augment.rand_augment(rand_augment_key, images, mesh=mesh)
    images = normalize(images)
    if erasing_probability > 0:
        images = random_erasing(erasing_key, images, probability=erasing_probability)
    targets = smooth_one_hot(labels, num_classes, label_smoothing)
    if mixup:
        images, targets = mixup_cutmix(mix_key, images, targets, group_size=group_size)
    return images, targets
