"""The config: mistakes are named with the field and the remedy; what a continuation may change."""

import importlib
import json
import re
import subprocess
import sys

import pytest

from stvit_jax import command_line, plans, recipes, schedules, validation
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
        ("data.dir", "gs://bucket/x", "is 'gs://bucket/x': data are read from a disk or a mount"),
        (
            "init_from",
            "s3://bucket/x",
            "give a path on this machine, gs://BUCKET/PATH or hf_hub:OWNER/NAME",
        ),
        ("task", "regression", "config.task is 'regression': it must be one of classification"),
        ("data.name", "scene_parse150", "the labels of its scene_parse150 are instances of 100"),
        ("schedule", "linear", "config.schedule is 'linear': it must be one of cosine, poly"),
        ("seed", 2**32, "config.seed is 4294967296: it must be less than 2**32"),
        ("gradient_clip", -1.0, "config.gradient_clip is -1.0: it must be finite and at least 0"),
        ("gradient_clip", float("inf"), "config.gradient_clip is inf: it must be finite"),
        ("gradient_clip", float("nan"), "config.gradient_clip is nan: it must be finite"),
        ("stall_after", -1.0, "config.stall_after is -1.0: give seconds, or 0 for never"),
        ("stall_after", float("nan"), "config.stall_after is nan: give seconds"),
        ("on_nonfinite", "go", "config.on_nonfinite is 'go': "),
        ("gradient_accumulation", 0, "gradient_accumulation is 0: it must be at least 1"),
        ("gradient_accumulation", 3, "is 3: config.batch_size 1024 must be that many parts of"),
        ("gradient_accumulation", 16, "parts of whole groups of config.group_size 128"),
        ("remat", (0, 1.0), "config.remat is (0, 1.0): write the numbers of stages, (0, 1)"),
        ("remat", (-1,), "config.remat is (-1,): write the numbers of stages, (0, 1)"),
        ("remat", ("0",), "config.remat is ('0',): write the numbers of stages, (0, 1)"),
        ("model.in_chans", 1, "config.model.in_chans is 1: pictures are read as RGB"),
    ],
)
def test_mistakes_are_named(field, value, message):
    config = configs.base()
    *path, last = field.split(".")
    with config.unlocked():
        (configs.field_of(config, ".".join(path)) if path else config)[last] = value
    with pytest.raises(UserError, match=re.escape(message)):
        validation.validate(config)


def test_parts_need_groups_or_frozen_statistics():
    config = configs.base()
    config.gradient_accumulation, config.group_size = 2, 0
    with pytest.raises(UserError, match="one group .* cannot be normalised in parts; set config.g"):
        validation.validate(config)
    config.freeze_batch_norm = True
    validation.validate(config)
    config.group_size, config.gradient_accumulation = 128, 1024
    validation.validate(config)
    config.gradient_accumulation = 3
    with pytest.raises(UserError, match="gradient_accumulation is 3: config.batch_size 1024 must"):
        validation.validate(config)


@pytest.mark.parametrize("text, value", [("(0,1)", (0, 1)), ("[2]", (2,)), ("3", (3,)), ("()", ())])
def test_stages_on_the_command_line(text, value):
    arguments = ["--config=configs/digits.py", "--workdir=w", f"--config.remat={text}"]
    config, *_ = command_line.train(arguments, "")
    assert config.remat == value
    validation.validate(config)


@pytest.mark.parametrize("name, rate", [("small", 0.15), ("base", 0.4), ("large", 0.5)])
def test_segmentation_s_recipes_are_the_papers(name, rate):
    module = importlib.import_module(f"configs.upernet_{name}")
    upernet, fpn = (module.get_config(arg) for arg in ("", "fpn"))
    for config in (upernet, fpn):
        validation.validate(config)
        assert (config.task, config.data.source) == ("segmentation", "ade20k")
        assert (config.model.name, config.model.drop_path_rate) == (f"stvit_{name}", rate)
        assert (config.batch_size, config.image_size, config.ema_decay) == (16, 512, 0)
        assert (config.group_size, config.data.repeats, config.data.flip) == (0, 1, True)
        assert config.segmentation.to_dict() == {
            "head": "upernet" if config is upernet else "fpn",
            "channels": None,
            "dropout": 0.1,
            "auxiliary_weight": 0.4,
            "mean_of_labelled": False,
            "freeze_bn": False,
            "long_side": 2048,
            "short_side": 512,
            "scale_range": (0.5, 2.0),
            "largest_class": 0.75,
            "photometric": True,
            "test": "whole",
            "test_scales": (1.0,),
            "test_flip": False,
        }
    for config, rate, decay, steps, power, warmup, rule in (
        (upernet, 6e-5, 0.01, 160_000, 1.0, 1500, "mmseg"),
        (fpn, 1e-4, 1e-4, 80_000, 0.9, 0, "all"),
    ):
        course = plans.COURSES[config.schedule](config, 1263)
        assert course.steps == steps and config.decay == rule and config.weight_decay == decay
        own = schedules.polynomial(rate, config.min_learning_rate, power, steps, warmup)
        for step in (0, warmup // 2, warmup, steps // 2, steps - 1):
            assert course.learning_rate(step) == pytest.approx(own(step), rel=1e-12)
    with pytest.raises(UserError, match="config argument 'xyz' is unknown"):
        module.get_config("xyz")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("gradient_accumulation", 2, "segmentation has no such thing: 1"),
        ("freeze_batch_norm", True, "set config.segmentation.freeze_bn=True"),
        ("data.source", "folder", "it must be one of tfds, folder, fake (config.task=classif"),
        ("data.source", "tfds", "the labels of its scene_parse150 are instances of 100 classes,"),
        ("total_steps", 0, "config.schedule=poly needs its length"),
        ("segmentation.scale_range", (2.0, 0.5), "write the least and the largest"),
        ("segmentation.test", "half", "it must be one of whole, slide"),
    ],
)
def test_what_does_not_go_with_segmentation_is_named(field, value, message):
    config = recipes.ade20k("")
    config.group_size = 8
    *path, last = field.split(".")
    (configs.field_of(config, ".".join(path)) if path else config)[last] = value
    with pytest.raises(UserError, match=f"config.{field} is .*{re.escape(message)}"):
        validation.validate(config)


def test_the_base_is_valid():
    validation.validate(configs.base())


def test_another_recipe_is_named_with_both_values():
    config = configs.base()
    before = configs.to_json(config)
    config.learning_rate, config.data.name = 1e-3, "cifar100"
    with pytest.raises(UserError) as caught:
        configs.check_same_recipe(config, before, "W/config.json")
    assert "W/config.json is of a run with another recipe" in str(caught.value)
    assert "config.data.name is 'cifar100', was 'imagenet2012'" in str(caught.value)
    assert "config.learning_rate is 0.001, was 0.0005" in str(caught.value)


def test_what_may_differ_may_differ():
    config = configs.base()
    before = configs.to_json(config)
    config.steps, config.log_every, config.checkpoint_every, config.checkpoint_keep = 7, 3, 2, 9
    config.data.workers, config.data.dir = 0, "elsewhere"
    config.gradient_accumulation, config.remat = 4, (0, 1)
    configs.check_same_recipe(config, before, "")


def test_a_run_of_a_version_without_a_field_had_its_default():
    config = configs.base()
    before = json.loads(configs.to_json(config))
    del before["task"]
    configs.check_same_recipe(config, json.dumps(before), "")
    config.task = "another"
    with pytest.raises(UserError, match="config.task is 'another', was 'classification'"):
        configs.check_same_recipe(config, json.dumps(before), "")


@pytest.mark.parametrize("text", ["{", "[]", "7", '{"model": 1' + "[" * 100_000])
def test_a_damaged_recipe_is_named(text):
    with pytest.raises(UserError, match="W/config.json cannot be read"):
        configs.check_same_recipe(configs.base(), text, "W/config.json")


def test_fields_that_a_remedy_names_exist():
    values = configs.base().to_dict()
    for check in validation.CHECKS:
        configs.field_of(configs.base(), check.field)
        assert check.remedy.format_map(values)


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
        (["--batch_size=16"], "there is no flag --batch_size; write --config.batch_size=VALUE"),
        (["stray"], "'stray' is no flag; write --config.FIELD=VALUE"),
        (["--config=configs/nope.py"], "there is no config 'configs/nope.py'; here are: configs/"),
        (["--config", "configs/digits.py:384"], "get_config() takes 0 positional arguments"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, monkeypatch):
    if not any(a.split("=")[0] == "--config" for a in arguments):
        arguments = ["--config", "configs/digits.py", *arguments]
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        command_line.train(["--workdir", "w", *arguments], "")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "workdir, message",
    [
        ("", "--workdir is empty"),
        ("  ", "--workdir is empty"),
        ("s3://bucket/run", "--workdir s3://bucket/run is an address, but none of gs://BUCKET/DIR"),
        ("gs://", "--workdir gs:// is an address, but none of gs://BUCKET/DIR"),
        ("gs://BUCKET/run", "is an address, but none of gs://BUCKET/DIR"),
    ],
)
def test_a_workdir_is_a_folder_of_this_machine_or_in_a_bucket(workdir, message):
    with pytest.raises(UserError, match=message):
        command_line.train(["--config=configs/digits.py", "--workdir", workdir], "")


def test_a_home_directory_is_expanded(monkeypatch):
    """A shell leaves the ~ of --flag=~/x as it is."""
    monkeypatch.setenv("HOME", "/home/of")
    where = ["--config.data.dir=~/data", "--config.init_from=~/w.pth"]
    arguments = ["--config=configs/digits.py", *where, "--workdir=~/run"]
    config, workdir, _ = command_line.train(arguments, "")
    assert (config.data.dir, config.init_from) == ("/home/of/data", "/home/of/w.pth")
    assert str(workdir) == "/home/of/run"


def test_overrides_do_not_depend_on_the_arguments_of_the_process():
    before = list(sys.argv)
    config = command_line.read_config("configs/digits.py", ["--config.epochs=3"])
    assert config.epochs == 3 and sys.argv == before


@pytest.mark.parametrize(
    "fault, line, code",
    [
        ("UserError('the thing')", "error: the thing", 1),
        ("OSError(28, 'No space left on device', '/x')", "error: /x: No space left on device", 1),
        ("SystemExit(75)", "", 75),
    ],
)
def test_a_command_ends_with_one_line_and_its_code(fault, line, code, capsys):
    def main():
        raise eval(fault)

    with pytest.raises(SystemExit) as ended:
        command_line.entry(main)
    assert ended.value.code == code and capsys.readouterr().err.strip() == line


HANGING = "threading.Thread(target=time.sleep, args=(1000,)).start()\n"
# Its threads are daemons, as the thread that started it is, and Python waits for them all the same.
POOL = (
    "from concurrent.futures import ThreadPoolExecutor\n"
    "pool = ThreadPoolExecutor(1)\n"
    "submit = threading.Thread(target=pool.submit, args=(time.sleep, 1000), daemon=True)\n"
    "submit.start(); submit.join()\n"
)


@pytest.mark.parametrize("code, start", [(0, HANGING), (1, HANGING), (75, HANGING), (1, POOL)])
def test_a_thread_that_hangs_does_not_keep_a_program_that_is_over(code, start):
    program = (
        "import threading, time\n"
        "from stvit_jax import command_line\n"
        "command_line.PATIENCE = 0.5\n"
        f"{start}"
        f"print('done', end='')\ncommand_line.entry(lambda: {code})\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "done"), done.stderr
