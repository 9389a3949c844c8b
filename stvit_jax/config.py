"""What a run is: every field with its default, the published recipes, validation with remedies.

A file in `configs/` takes `base()` or `imagenet(arg)`, changes what differs, and locks the result.
Nothing here knows of devices, data or networks.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict

from stvit_jax import places
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

    config.image_size = 224  # pixels, square; 0: that of init_from
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
    config.epochs = 300
    config.steps = 0  # > 0 ends the run early; schedules follow epochs
    config.learning_rate = 5e-4  # per 512 images
    config.min_learning_rate = 1e-5
    config.warmup_learning_rate = 1e-6
    config.warmup_epochs = 5
    config.weight_decay = 0.05
    config.gradient_clip = 0.0  # largest global norm of a gradient; 0: off, as published
    config.ema_decay = 0.99996  # 0: no moving average
    config.label_smoothing = 0.1
    config.augment = ConfigDict()  # on the device; see augment.py
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
    config.robustness = ()  # data sets to evaluate how far a model carries, see robustness.py
    config.eval_only = False  # evaluate what the workdir, or init_from, holds

    config.log_every = 50  # steps
    config.logger = ""  # wandb or trackio follow the run, too; "": nobody
    config.logger_project = "stvit_jax"  # where it is listed there
    config.eval_every_epochs = 1  # 0: only at the end
    config.checkpoint_every = 1000  # steps
    config.checkpoint_keep = 3
    config.checkpoint_best = False  # save at the best evaluation, and keep that one besides
    config.stall_after = 600.0  # seconds in which nothing happens, before the run ends; 0: off
    config.on_nonfinite = "stop"  # where a loss is not finite; skip: back, and past the batches
    return config


def imagenet(arg: str) -> ConfigDict:
    """The recipe that a config's argument (`configs/NAME.py:ARG`) stands for, not locked.

    Args:
      arg: "" for training at 224, "384" for fine-tuning at 384.

    Raises:
      UserError: any other argument.
    """
    if arg not in ("", "384"):
        raise UserError(
            f"config argument {arg!r} is unknown: write configs/NAME.py (training at 224) or "
            "configs/NAME.py:384 (fine-tuning at 384)"
        )
    config = base()
    if arg:
        config.image_size = 384
        config.epochs = 30
        config.batch_size = 512
        config.group_size = 64
        config.learning_rate = 5e-6
        config.min_learning_rate = 5e-6
        config.warmup_epochs = 0
        config.weight_decay = 1e-8
        config.freeze_batch_norm = True  # inference mode: drop path is off, too
    return config


class Check(NamedTuple):
    """What a field must be: a test of (its value, the config), and the words for when it fails."""

    field: str
    test: Callable[[Any, ConfigDict], bool]
    remedy: str  # may name other fields: {batch_size}


def _at_least(least: float, *fields: str) -> list[Check]:
    # NaN fails, too.
    return [Check(f, lambda v, _: v >= least, f"it must be at least {least}") for f in fields]


def _share(*fields: str) -> list[Check]:
    return [Check(f, lambda v, _: 0 <= v < 1, "it must be in [0, 1)") for f in fields]


def _one_of(field: str, *known: str) -> Check:
    return Check(field, lambda v, _: v in known, f"it must be one of {', '.join(known)}")


def _is_change(change: Any) -> bool:
    """Whether an entry of `drop_path_schedule` is (epoch, rate)."""
    if not isinstance(change, tuple | list) or len(change) != 2:
        return False
    epoch, rate = change
    return type(epoch) is int and epoch >= 0 and isinstance(rate, int | float) and 0 <= rate < 1


def _is_local(path: str, _: ConfigDict) -> bool:
    return not places.is_address(path)


_LOCAL = (
    "data are read from a disk or a mount of this machine, and ArrayRecord reads no bucket: copy "
    "them here, or mount it (gcsfuse)"
)

CHECKS: tuple[Check, ...] = (
    _one_of("task", "classification"),
    *_at_least(0, "image_size", "freeze_stages"),
    Check("layer_decay", lambda v, _: 0 < v <= 1, "it must be above 0 and at most 1"),
    Check(
        "freeze_stages",
        lambda v, c: not v or c.freeze_batch_norm,
        "the statistics of frozen stages stay, too: set config.freeze_batch_norm=True",
    ),
    Check(
        "linear_probe",
        lambda v, c: not v or c.freeze_batch_norm,
        "the statistics stay, too: set config.freeze_batch_norm=True",
    ),
    *_at_least(1, "batch_size", "epochs", "log_every", "gradient_accumulation"),
    *_at_least(1, "checkpoint_every", "checkpoint_keep", "data.repeats"),
    *_at_least(0, "group_size", "steps", "warmup_epochs", "seed", "eval_every_epochs"),
    *_at_least(0, "learning_rate", "min_learning_rate", "warmup_learning_rate", "weight_decay"),
    Check("gradient_clip", lambda v, _: 0 <= v < math.inf, "it must be finite and at least 0"),
    *_at_least(0, "data.workers"),
    Check("stall_after", lambda v, _: 0 <= v < math.inf, "give seconds, or 0 for never"),
    _one_of("on_nonfinite", "stop", "skip"),
    _one_of("logger", "", "wandb", "trackio"),
    Check("seed", lambda v, _: v < 2**32, "it must be less than 2**32"),
    *_share("ema_decay", "label_smoothing", "data.max_bad_fraction"),
    Check("augment.erasing_probability", lambda v, _: 0 <= v <= 1, "it must be in [0, 1]"),
    _one_of("dtype", "bfloat16", "float32", "float64"),
    _one_of("kernels", "auto", "plain"),
    _one_of("data.source", "tfds", "folder", "fake"),
    Check("data.dir", _is_local, _LOCAL),
    Check(
        "init_from",
        lambda v, _: not places.is_address(v) or re.match("gs:/", v),
        "give a path on this machine, gs://BUCKET/PATH or hf_hub:OWNER/NAME",
    ),
    Check(
        "teacher.init_from",
        lambda v, _: not places.is_address(v) or re.match("gs:/", v),
        "give a path on this machine, or gs://BUCKET/PATH",
    ),
    _one_of("teacher.kind", "soft", "hard"),
    Check("teacher.alpha", lambda v, _: 0 <= v <= 1, "it must be in [0, 1]"),
    Check("teacher.temperature", lambda v, _: 0 < v < math.inf, "it must be finite and positive"),
    Check(
        "batch_size",
        lambda v, c: not c.group_size or v % c.group_size == 0,
        "it must be a multiple of config.group_size {group_size} (0: the whole batch)",
    ),
    Check(
        "gradient_accumulation",
        lambda v, c: v == 1 or c.group_size > 0 or c.freeze_batch_norm,
        "a batch that is one group (config.group_size 0) cannot be normalised in parts; set "
        "config.group_size",
    ),
    Check(
        "gradient_accumulation",
        lambda v, c: c.batch_size % (v * (1 if c.freeze_batch_norm else c.group_size or 1)) == 0,
        "config.batch_size {batch_size} must be that many parts of whole groups of "
        "config.group_size {group_size}",
    ),
    Check(
        "remat",
        lambda v, _: all(type(stage) is int and stage >= 0 for stage in v),
        "write the numbers of stages, (0, 1)",
    ),
    Check(
        "warmup_epochs",
        lambda v, c: v <= c.epochs,
        "it must be at most config.epochs {epochs}",
    ),
    Check(
        "drop_path_schedule",
        lambda v, _: all(map(_is_change, v)),
        "write ((epoch, rate), ...), such as ((260, 0.6),)",
    ),
    Check(
        "robustness",
        lambda v, _: all(isinstance(name, str) for name in v),
        "write the names of data sets, ('imagenet_a', ...)",
    ),
    Check("model.num_classes", lambda v, _: v != 0, "without a classifier nothing is learned"),
    Check("model.in_chans", lambda v, _: v in (None, 3), "pictures are read as RGB; leave it out"),
)


def validate(config: ConfigDict) -> None:
    """Checks what can be known before any data or device is touched.

    Raises:
      UserError: names the field and the remedy.
    """
    values = _flat(config.to_dict())
    for check in CHECKS:
        value = values[check.field]
        if not check.test(value, config):
            remedy = check.remedy.format_map(values)
            raise UserError(f"config.{check.field} is {one_line(repr(value))}: {remedy}")


def model_settings(config: ConfigDict) -> dict[str, Any]:
    """The overrides of `create_model` that the config states."""
    return {k: v for k, v in config.model.items() if k != "name" and v is not None}


def flat(config: ConfigDict) -> dict[str, str | int | float | bool]:
    """All fields by their dotted names, as a table of runs takes them."""
    plain = (str, int, float, bool)
    return {
        name: value if isinstance(value, plain) else str(value)
        for name, value in _flat(config.to_dict()).items()
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
        then = _flat(json.loads(before))
    except (ValueError, RecursionError, AttributeError) as error:
        raise UserError(
            f"{where} cannot be read ({one_line(error)}); restore it, or start in another --workdir"
        ) from None
    now = _flat(json.loads(to_json(config)))
    then = _flat(json.loads(to_json(base()))) | then
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
    return list(_flat(base().to_dict()))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat
