"""The base config of every run, and its validation with remedies; knows nothing of devices.

A file in `configs/` takes `base()`, changes what differs, and locks the result.
"""

import json
import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from stvit_jax.errors import UserError
from stvit_jax.models.stvit import create_model

# What may differ between a run and its continuation; everything else makes another recipe.
_MAY_DIFFER = (
    "steps",
    "log_every",
    "eval_only",
    "data.workers",
    "data.dir",
    "data.max_bad_fraction",
    "checkpoint_every",
    "checkpoint_keep",
)


def base() -> ConfigDict:
    """The published 224 recipe without a data set; every field that a command line can override."""
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.name = "stvit_small"
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

    config.image_size = 224  # pixels, square
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
    config.epochs = 300
    config.steps = 0  # > 0 ends the run early; schedules follow epochs
    config.learning_rate = 5e-4  # per 512 images
    config.min_learning_rate = 1e-5
    config.warmup_learning_rate = 1e-6
    config.warmup_epochs = 5
    config.weight_decay = 0.05
    config.ema_decay = 0.99996  # 0: no moving average
    config.label_smoothing = 0.1
    config.augment = ConfigDict()  # on the device; see augment.py
    config.augment.randaugment = True
    config.augment.erasing_probability = 0.25
    config.augment.mixup = True  # and CutMix
    config.drop_path_schedule = ()  # ((epoch, rate), ...): from that epoch on
    config.freeze_batch_norm = False  # fine-tuning: running statistics used and kept, no drop path
    config.dtype = "bfloat16"  # of compute; float32, float64
    config.init_from = ""  # .pth, .safetensors, converted directory or workdir to start from
    config.init_from_ema = False  # take its moving average
    config.seed = 0
    config.robustness = ()  # data sets to evaluate how far a model carries, see robustness.py
    config.eval_only = False  # evaluate what the workdir, or init_from, holds

    config.log_every = 50  # steps
    config.eval_every_epochs = 1  # 0: only at the end
    config.checkpoint_every = 1000  # steps
    config.checkpoint_keep = 3
    return config


def validate(config: ConfigDict) -> None:
    """Checks what can be known before any data or device is touched.

    Raises:
      UserError: names the field and the remedy.
    """
    at_least = {
        "image_size": 1,
        "batch_size": 1,
        "group_size": 0,
        "epochs": 1,
        "steps": 0,
        "learning_rate": 0,
        "min_learning_rate": 0,
        "warmup_learning_rate": 0,
        "warmup_epochs": 0,
        "weight_decay": 0,
        "seed": 0,
        "log_every": 1,
        "eval_every_epochs": 0,
        "checkpoint_every": 1,
        "checkpoint_keep": 1,
        "data.workers": 0,
        "data.repeats": 1,
    }
    for field, least in at_least.items():
        if not field_of(config, field) >= least:  # NaN, too
            _fail(field, field_of(config, field), f"it must be at least {least}")
    if config.seed >= 2**32:
        _fail("seed", config.seed, "it must be less than 2**32")
    for field in ("ema_decay", "label_smoothing", "data.max_bad_fraction"):
        if not 0 <= field_of(config, field) < 1:
            _fail(field, field_of(config, field), "it must be in [0, 1)")
    if not 0 <= config.augment.erasing_probability <= 1:
        _fail(
            "augment.erasing_probability",
            config.augment.erasing_probability,
            "it must be in [0, 1]",
        )
    for field, known in {
        "dtype": ("bfloat16", "float32", "float64"),
        "data.source": ("tfds", "folder", "fake"),
    }.items():
        if field_of(config, field) not in known:
            _fail(field, field_of(config, field), f"it must be one of {', '.join(known)}")
    if config.group_size and config.batch_size % config.group_size:
        _fail(
            "batch_size",
            config.batch_size,
            f"it must be a multiple of config.group_size {config.group_size} (0: the whole batch)",
        )
    if config.warmup_epochs > config.epochs:
        _fail(
            "warmup_epochs",
            config.warmup_epochs,
            f"it must be at most config.epochs {config.epochs}",
        )
    if not all(map(_is_change, config.drop_path_schedule)):
        _fail(
            "drop_path_schedule",
            config.drop_path_schedule,
            "write ((epoch, rate), ...), such as ((260, 0.6),)",
        )
    if not all(isinstance(name, str) for name in config.robustness):
        _fail("robustness", config.robustness, "write the names of data sets, ('imagenet_a', ...)")
    values = (config.group_size or config.batch_size) * math.ceil(config.image_size / 32) ** 2
    if values == 1 and not (config.freeze_batch_norm or config.eval_only):
        _fail(
            "image_size",
            config.image_size,
            "the last stage has one pixel, and BatchNorm one value in a group; raise "
            "config.group_size, or config.image_size above 32",
        )
    if config.model.in_chans not in (None, 3):
        _fail("model.in_chans", config.model.in_chans, "pictures are read as RGB; leave it out")
    model_settings(config)


def model_settings(config: ConfigDict) -> dict[str, Any]:
    """The overrides of `create_model` that the config states.

    Raises:
      UserError: an unknown model, or settings that do not fit together.
    """
    settings = {k: v for k, v in config.model.items() if k != "name" and v is not None}
    try:
        create_model(config.model.name, **settings)
    except UserError as error:
        raise UserError(f"config.model: {error}") from None
    return settings


def write(config: ConfigDict, path: Path) -> None:
    """Writes `config.json`."""
    path.write_text(config.to_json_best_effort(indent=2, sort_keys=True) + "\n")


def check_same_recipe(config: ConfigDict, path: Path) -> None:
    """Compares a config with the `config.json` of the run it is to continue.

    Raises:
      UserError: another recipe; names the fields with both values.
    """
    try:
        before = _flat(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); restore it, or start in another --workdir"
        ) from None
    now = _flat(json.loads(config.to_json_best_effort()))
    differing = [
        f"config.{field} is {now.get(field)!r}, was {before.get(field)!r}"
        for field in sorted(before.keys() | now.keys())
        if field not in _MAY_DIFFER and before.get(field) != now.get(field)
    ]
    if differing:
        raise UserError(
            f"{path.parent} holds a run with another recipe: {'; '.join(differing)}; "
            "use the same values, or another --workdir"
        )


def field_of(config: ConfigDict, name: str) -> Any:
    """The value of a dotted field name."""
    for part in name.split("."):
        config = config[part]
    return config


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _is_change(change: Any) -> bool:
    """Whether an entry of `drop_path_schedule` is (epoch, rate)."""
    if not isinstance(change, tuple | list) or len(change) != 2:
        return False
    epoch, rate = change
    return type(epoch) is int and epoch >= 0 and isinstance(rate, int | float) and 0 <= rate < 1


def _fail(field: str, value: Any, remedy: str) -> None:
    raise UserError(f"config.{field} is {value!r}: {remedy}")
