"""What a run is: every field with its default, and a run's fields beside those of its continuation.

A file in `configs/` takes `base()` or a recipe of `recipes.py`, changes what differs, and locks the
result; `validation.py` says what a field must be. Nothing here knows of devices, data or networks.
"""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from stvit_jax.errors import UserError, listing, one_line

# What may differ between a run and its continuation; everything else makes another recipe.
_MAY_DIFFER = (
    "steps",
    "log_every",
    "logger",
    "logger_project",
    "eval_only",
    "data.workers",
    "data.dir",
    "data.max_bad_fraction",
    "checkpoint_every",
    "checkpoint_keep",
    "checkpoint_best",
    # As with the number of devices, the sums of a step are in another order, and no more.
    "gradient_accumulation",
    "remat",
    "stall_after",
    "on_nonfinite",
)


def base() -> ConfigDict:
    """The published 224 recipe without a data set; every field that a command line can override."""
    config = ConfigDict()
    config.task = "classification"

    config.model = ConfigDict()
    config.model.name = "stvit_small"  # "": the network of init_from, with its settings
    config.model.num_classes = config_dict.placeholder(int)  # None: as many as the data set has
    config.model.drop_path_rate = 0.0
    # None: as the variant has it.
    for field in ("embed_dim", "depths", "num_heads", "n_iter", "stoken_size", "layerscale"):
        config.model[field] = config_dict.placeholder(tuple)
    for field in ("mlp_ratio", "init_values"):
        config.model[field] = config_dict.placeholder(float)
    for field in ("projection", "in_chans"):
        config.model[field] = config_dict.placeholder(int)
    config.model.qkv_bias = config_dict.placeholder(bool)

    config.image_size = 224  # pixels, square; 0: that of init_from; segmentation: the crop
    config.data = ConfigDict()
    config.data.source = "tfds"
    config.data.name = "imagenet2012"
    config.data.dir = ""  # "": where tfds keeps its data sets
    config.data.workers = 8  # loader processes of a host; 0 loads in the training process
    config.data.repeats = 3  # repeated augmentation; 1: off
    config.data.max_bad_fraction = 0.01  # of images that do not decode, before the run stops
    config.data.flip = True  # mirror half of the training images

    config.batch_size = 1024  # global, over all devices and hosts
    config.group_size = 128  # images that share BatchNorm statistics; 0: the whole batch
    # Less memory, the same result: how many parts a batch is learned from one after the other, each
    # of whole groups (an update still has batch_size images); and the stages, from 0, whose blocks
    # are computed again in the backward pass, as (0, 1).
    config.gradient_accumulation = 1
    config.remat = ()
    config.schedule = "cosine"  # by epoch; poly: by step
    config.epochs = 300  # of cosine
    config.steps = 0  # > 0 ends the run early; schedules follow epochs, or total_steps
    config.learning_rate = 5e-4  # per 512 images
    config.min_learning_rate = 1e-5
    config.warmup_learning_rate = 1e-6  # this and the next of cosine
    config.warmup_epochs = 5
    config.total_steps = 0  # this and the next two of poly
    config.warmup_steps = 0
    config.poly_power = 1.0
    config.weight_decay = 0.05
    config.decay = "1d"  # of all but biases, scales; mmseg: but what has norm in its name; all
    config.gradient_clip = 0.0  # largest global norm of a gradient; 0: off, as published
    config.ema_decay = 0.99996  # 0: no moving average
    config.label_smoothing = 0.1
    config.augment = ConfigDict()  # on the device; see augment/
    config.augment.randaugment = True
    config.augment.erasing_probability = 0.25
    config.augment.mixup = True  # and CutMix
    config.drop_path_schedule = ()  # ((epoch, rate), ...): from that epoch on
    # Of fine-tuning, see models/depth.py: the learning rate by layer, as a power of this (1: all
    # alike); how many stages stay as they are; whether the classifier alone learns.
    config.layer_decay = 1.0
    config.freeze_stages = 0
    config.linear_probe = False
    config.freeze_batch_norm = False  # fine-tuning: running statistics used and kept, no drop path

    config.segmentation = ConfigDict()  # the task; see tasks/segmentation.py
    config.segmentation.head = "upernet"  # or fpn
    config.segmentation.channels = config_dict.placeholder(int)  # its width; None: as published
    config.segmentation.dropout = 0.1
    config.segmentation.auxiliary_weight = 0.4  # of UPerNet's second loss
    config.segmentation.mean_of_labelled = False  # ignored pixels do not count in the loss's mean
    config.segmentation.freeze_bn = False  # the backbone's: running statistics, nothing learned
    config.segmentation.long_side = 2048  # what pictures are resized into, before the crop ...
    config.segmentation.short_side = 512
    config.segmentation.scale_range = (0.5, 2.0)  # ... times one of these
    config.segmentation.largest_class = 0.75  # most of a crop that is of one class; 1: whatever
    config.segmentation.photometric = True
    config.segmentation.test = "whole"  # slide: crops, a third of them overlapping
    config.segmentation.test_scales = (1.0,)  # of several the mean, as (0.5, 0.75, 1, 1.25, 1.5)
    config.segmentation.test_flip = False  # and of mirrored pictures

    config.dtype = "bfloat16"  # of compute; float32, float64
    config.kernels = "auto"  # in bfloat16 those that suit the device; plain: XLA's alone
    config.deterministic = False  # GPU: runs that repeat bit by bit, see parallel.py
    config.init_from = ""  # .pth, .safetensors, directory, workdir; gs://, hf_hub:
    config.init_from_ema = False  # take its moving average
    config.teacher = ConfigDict()  # distillation; see tasks/distillation.py
    config.teacher.init_from = ""  # a trained network, in the forms of init_from; "": off
    config.teacher.init_from_ema = False  # its moving average
    config.teacher.kind = "hard"  # soft: its distribution; hard: its best class
    config.teacher.alpha = 0.5  # the teacher's share of the loss
    config.teacher.temperature = 1.0  # of both distributions, where soft
    config.seed = 0
    config.robustness = ()  # data sets to evaluate how far a model carries, see tasks/robustness.py
    config.eval_only = False  # evaluate what the workdir, or init_from, holds

    config.log_every = 50  # steps
    config.logger = ""  # wandb or trackio follow the run, too; "": nobody
    config.logger_project = "stvit_jax"  # where it is listed there
    config.eval_every_epochs = 1  # of cosine; 0: only at the end
    config.eval_every_steps = 0  # likewise, of poly
    config.checkpoint_every = 1000  # steps
    config.checkpoint_keep = 3
    config.checkpoint_best = False  # save at the best evaluation, and keep that one besides
    config.stall_after = 600.0  # seconds in which nothing happens, before the run ends; 0: off
    config.on_nonfinite = "stop"  # where a loss is not finite; skip: back, and past the batches
    return config


def model_settings(config: ConfigDict, classes: int, whose: str) -> dict[str, Any]:
    """The overrides of `create_model` that the config states, with the number of classes.

    Args:
      config: the config.
      classes: how many there are.
      whose: in words, "cifar10 has".

    Raises:
      UserError: the config states another number.
    """
    settings = {k: v for k, v in config.model.items() if k != "name" and v is not None}
    if settings.setdefault("num_classes", classes) != classes:
        raise UserError(
            f"config.model.num_classes is {config.model.num_classes}, but {whose} {classes} "
            f"classes: leave it out, or set {classes}"
        )
    return settings


def flat(config: ConfigDict) -> dict[str, str | int | float | bool]:
    """All fields by their dotted names, as a table of runs takes them."""
    plain = (str, int, float, bool)
    return {
        name: value if isinstance(value, plain) else str(value)
        for name, value in flattened(config.to_dict()).items()
    }


def to_json(config: ConfigDict) -> str:
    """What `config.json` of a workdir holds."""
    return config.to_json_best_effort(indent=2, sort_keys=True) + "\n"


def check_same_recipe(config: ConfigDict, before: str, where: str) -> None:
    """Compares a config with that of the run it is to continue.

    A field that the run's version did not have yet counts as its default.

    Args:
      config: of now.
      before: what `to_json` wrote when the run began.
      where: what messages call it.

    Raises:
      UserError: another recipe; names the fields with both values. Or `before` is no such text.
    """
    try:
        then = flattened(json.loads(before))
    except (ValueError, RecursionError, AttributeError) as error:
        raise UserError(
            f"{where} cannot be read ({one_line(error)}); restore it, or start in another --workdir"
        ) from None
    now = flattened(json.loads(to_json(config)))
    then = flattened(json.loads(to_json(base()))) | then
    differing = [
        f"config.{field} is {now.get(field)!r}, was {then.get(field)!r}"
        for field in sorted(then.keys() | now.keys())
        if field not in _MAY_DIFFER and then.get(field) != now.get(field)
    ]
    if differing:
        raise UserError(
            f"{where} is of a run with another recipe: {listing(differing)}; use the same values, "
            "or another --workdir"
        )


def field_of(config: ConfigDict, name: str) -> Any:
    """The value of a dotted field name."""
    for part in name.split("."):
        config = config[part]
    return config


def field_names() -> list[str]:
    """The dotted names of all fields."""
    return list(flattened(base().to_dict()))


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dictionary by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= flattened(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat
