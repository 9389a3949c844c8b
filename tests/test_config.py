"""The config: mistakes are named with the field and the remedy; what a continuation may change."""

import re
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from stvit_jax import command_line
from stvit_jax import config as configs
from stvit_jax.errors import UserError


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("batch_size", 1000, "config.batch_size is 1000: it must be a multiple of config.group"),
        ("learning_rate", float("nan"), "config.learning_rate is nan: it must be at least 0"),
        ("ema_decay", 1.0, "config.ema_decay is 1.0: it must be in [0, 1)"),
        ("dtype", "fp16", "config.dtype is 'fp16': it must be one of bfloat16, float32, float64"),
        ("data.source", "webdataset", "config.data.source is 'webdataset': it must be one of tfds"),
        ("data.workers", -1, "config.data.workers is -1: it must be at least 0"),
        ("log_every", 0, "config.log_every is 0: it must be at least 1"),
        ("warmup_epochs", 301, "warmup_epochs is 301: it must be at most config.epochs 300"),
        ("drop_path_schedule", ((3, 1.5),), "write ((epoch, rate), ...)"),
        ("drop_path_schedule", (3, 0.5), "write ((epoch, rate), ...)"),
        ("drop_path_schedule", ((3, "a"),), "write ((epoch, rate), ...)"),
        ("drop_path_schedule", ((1.5, 0.2),), "write ((epoch, rate), ...)"),
        ("drop_path_schedule", ((-1, 0.2),), "write ((epoch, rate), ...)"),
        ("augment.erasing_probability", 1.5, "erasing_probability is 1.5: it must be in [0, 1]"),
        ("augment.erasing_probability", float("nan"), "is nan: it must be in [0, 1]"),
        ("robustness", (1,), "config.robustness is (1,): write the names of data sets"),
        ("model.name", "stvit_smal", "config.model: unknown model 'stvit_smal'; did you mean"),
        ("seed", 2**32, "config.seed is 4294967296: it must be less than 2**32"),
        ("model.in_chans", 1, "config.model.in_chans is 1: pictures are read as RGB"),
        ("model.depths", (1, 2), "config.model: model.depths has 2 stages"),
    ],
)
def test_mistakes_are_named(field, value, message):
    config = configs.base()
    *path, last = field.split(".")
    with config.unlocked():
        (configs.field_of(config, ".".join(path)) if path else config)[last] = value
    with pytest.raises(UserError, match=re.escape(message)):
        configs.validate(config)


@pytest.mark.parametrize(
    "image_size, group_size, valid", [(32, 1, False), (33, 1, True), (32, 2, 1)]
)
def test_one_value_cannot_be_normalised(image_size, group_size, valid):
    config = configs.base()
    config.image_size, config.group_size = image_size, group_size
    if valid:
        return configs.validate(config)
    with pytest.raises(UserError, match="BatchNorm one value in a group; raise config.group_size"):
        configs.validate(config)
    config.eval_only = True
    configs.validate(config)


def test_the_base_is_valid():
    configs.validate(configs.base())


def test_another_recipe_is_named_with_both_values(tmp_path):
    config = configs.base()
    configs.write(config, tmp_path / "config.json")
    config.learning_rate, config.data.name = 1e-3, "cifar100"
    with pytest.raises(UserError) as caught:
        configs.check_same_recipe(config, tmp_path / "config.json")
    assert "config.data.name is 'cifar100', was 'imagenet2012'" in str(caught.value)
    assert "config.learning_rate is 0.001, was 0.0005" in str(caught.value)


def test_what_may_differ_may_differ(tmp_path):
    config = configs.base()
    configs.write(config, tmp_path / "config.json")
    config.steps, config.log_every, config.checkpoint_every, config.checkpoint_keep = 7, 3, 2, 9
    config.data.workers, config.data.dir = 0, "elsewhere"
    configs.check_same_recipe(config, tmp_path / "config.json")


def test_a_damaged_recipe_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read"):
        configs.check_same_recipe(configs.base(), tmp_path / "config.json")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--config.batch_sizee=3"],
            "no field config.batch_sizee; did you mean config.batch_size?",
        ),
        (["--config.model.foo=3"], "there is no field config.model.foo"),
        (["--config.batch_size=abc"], "flag --config.batch_size=abc: invalid literal for int()"),
        (["--config.data.name.x=3"], "there is no field config.data.name.x"),
        (["--bogus"], "Unknown command line flag 'bogus'"),
        (["--config=configs/nope.py"], "there is no config 'configs/nope.py'; here are: configs/"),
        (["--config", "configs/digits.py:384"], "get_config() takes 0 positional arguments"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, monkeypatch):
    if not any(a.split("=")[0] == "--config" for a in arguments):
        arguments = ["--config", "configs/digits.py", *arguments]
    # config_flags reads the overrides from sys.argv.
    monkeypatch.setattr(sys, "argv", ["train.py", "--workdir", "w", *arguments])
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        command_line.parse(sys.argv)
    assert "\n" not in str(caught.value)


def test_a_home_directory_is_expanded(monkeypatch):
    """A shell leaves the ~ of --flag=~/x as it is."""
    monkeypatch.setenv("HOME", "/home/of")
    where = ["--config.data.dir=~/data", "--config.init_from=~/w.pth"]
    arguments = ["x", "--config=configs/digits.py", *where]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values)
    monkeypatch.setattr(sys, "argv", arguments)
    command_line.read_config(values, arguments)
    assert (config.value.data.dir, config.value.init_from) == ("/home/of/data", "/home/of/w.pth")
