"""What the fields of a config must be, with remedies: a table of tests."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from stvit_jax import places
from stvit_jax.config import flattened
from stvit_jax.errors import UserError, one_line


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


def _fits_task(field: str, **known: tuple[str, ...]) -> Check:
    """One of those that go with the task."""
    said = "; ".join(f"{', '.join(names)} (config.task={task})" for task, names in known.items())
    return Check(field, lambda v, c: v in known[c.task], f"it must be one of {said}")


def _is_local(path: str, _: ConfigDict) -> bool:
    return not places.is_address(path)


_LOCAL = (
    "data are read from a disk or a mount of this machine, and ArrayRecord reads no bucket: copy "
    "them here, or mount it (gcsfuse)"
)

_SCENE_PARSE = (
    "tfds has no scenes to segment, the labels of its scene_parse150 are instances of 100 classes, "
    "not the 150 classes of pixels: get ADEChallengeData2016, and set config.task=segmentation, "
    "config.data.source=ade20k and config.data.dir"
)

IMAGES = ("tfds", "folder", "fake")
SCENES = ("ade20k", "segmentation_folder", "digit_scenes", "fake")


def _of_segmentation(field: str, test: Callable[[Any], bool], remedy: str) -> Check:
    return Check(f"segmentation.{field}", lambda v, _: test(v), remedy)


def _not_for_segmentation(field: str, neutral: Any, remedy: str) -> Check:
    return Check(field, lambda v, c: c.task != "segmentation" or v == neutral, remedy)


SEGMENTATION: tuple[Check, ...] = (
    _one_of("segmentation.head", "upernet", "fpn"),
    _one_of("segmentation.test", "whole", "slide"),
    *_share("segmentation.dropout"),
    *_at_least(0, "segmentation.auxiliary_weight"),
    *_at_least(1, "segmentation.long_side", "segmentation.short_side"),
    _of_segmentation("largest_class", lambda v: 0 < v <= 1, "it must be above 0 and at most 1"),
    _of_segmentation(
        "scale_range",
        lambda v: len(v) == 2 and 0 < v[0] <= v[1],
        "write the least and the largest, (0.5, 2.0)",
    ),
    _of_segmentation(
        "test_scales",
        lambda v: len(v) > 0 and all(isinstance(x, int | float) and x > 0 for x in v),
        "write one or several, (1.0,)",
    ),
    _not_for_segmentation(
        "freeze_batch_norm", False, "to segment, set config.segmentation.freeze_bn=True"
    ),
    *(
        _not_for_segmentation(field, neutral, f"segmentation has no such thing: {neutral!r}")
        for field, neutral in (
            ("gradient_accumulation", 1),  # BatchNorm of the heads sees the whole batch
            ("layer_decay", 1.0),
            ("freeze_stages", 0),
            ("linear_probe", False),
            ("teacher.init_from", ""),
            ("robustness", ()),
            ("drop_path_schedule", ()),
        )
    ),
)

CHECKS: tuple[Check, ...] = (
    _one_of("task", "classification", "segmentation"),
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
    _one_of("schedule", "cosine", "poly"),
    _one_of("decay", "1d", "mmseg", "all"),
    Check(
        "total_steps",
        lambda v, c: c.schedule != "poly" or v >= 1,
        "config.schedule=poly needs its length",
    ),
    Check(
        "warmup_steps",
        lambda v, c: c.schedule != "poly" or v <= c.total_steps,
        "it must be at most config.total_steps {total_steps}",
    ),
    *_at_least(0, "total_steps", "warmup_steps", "poly_power", "eval_every_steps"),
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
    Check("data.name", lambda v, _: not v.startswith("scene_parse150"), _SCENE_PARSE),
    Check("data.source", lambda v, c: (v, c.task) != ("tfds", "segmentation"), _SCENE_PARSE),
    _fits_task("data.source", classification=IMAGES, segmentation=SCENES),
    Check("data.dir", _is_local, _LOCAL),
    *SEGMENTATION,
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
    values = flattened(config.to_dict())
    for check in CHECKS:
        value = values[check.field]
        if not check.test(value, config):
            remedy = check.remedy.format_map(values)
            raise UserError(f"config.{check.field} is {one_line(repr(value))}: {remedy}")
