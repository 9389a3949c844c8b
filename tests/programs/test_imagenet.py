"""The ImageNet recipe through train.py: tfds's own imagenet2012 in miniature, and class folders."""

import argparse
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stvit_jax import command_line, torch_weights
from stvit_jax.data.sources import open_source
from stvit_jax.models.stvit import create_model
from tests import mini_imagenet
from tests.program import NARROW, ROOT, TWO_STAGES, Program, digests, values

# The recipe stays whole; the network, the images and the batch are small.
SMALL = (
    *NARROW,
    "--config.image_size=64",
    "--config.batch_size=16",
    "--config.group_size=8",
    "--config.log_every=1",
    "--config.data.max_bad_fraction=0.1",
)
STEPS, STOP = 4, 2  # an epoch has 64


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mini_imagenet.prepare(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="module")
def folder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mini_imagenet.write_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def train(compiled: dict[str, str]) -> Callable[..., str]:
    """Runs train.py to its end; returns what it printed."""

    def train(workdir: Path, *flags: str) -> str:
        program = Program(
            workdir,
            *SMALL,
            *flags,
            config="configs/stvit_small.py",
            **compiled,
        )
        assert program.wait() == 0, program.output
        return program.output

    return train


@pytest.fixture(scope="module")
def straight(train: Callable[..., str], tfds_dir: Path, tmp_path_factory) -> Path:
    """The workdir of a run on tfds that nobody stopped."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    train(
        workdir,
        f"--config.data.dir={tfds_dir}",
        f"--config.steps={STEPS}",
        f"--config.checkpoint_every={STOP}",
        "--config.data.workers=0",
    )
    return workdir


def check_evaluation(workdir: Path, step: int, count: int) -> None:
    for name in ("eval", "eval_ema"):
        assert values(workdir, f"{name}/count")[step] == count
        assert values(workdir, f"{name}/unreadable")[step] == 1
        assert 0 <= values(workdir, f"{name}/top1")[step] <= values(workdir, f"{name}/top5")[step]


@pytest.mark.docs
def test_both_sources_hold_the_same_pictures(tfds_dir: Path, folder_dir: Path) -> None:
    for split in (True, False):
        prepared = open_source("tfds", "imagenet2012", str(tfds_dir), train=split)
        folders = open_source("folder", "", str(folder_dir), train=split)
        assert prepared.class_names == folders.class_names and prepared.num_classes == 1000
        pictures = [
            sorted((example["label"], example["image"]) for example in source)
            for source in (prepared, folders)
        ]
        if split:
            assert len(pictures[0]) == mini_imagenet.TRAIN and pictures[0] == pictures[1]
        else:
            assert len(pictures[0]) == mini_imagenet.VALIDATION
            assert set(pictures[0]) <= set(pictures[1])


@pytest.mark.docs
def test_trains_and_evaluates_from_tfds(straight: Path) -> None:
    assert list(values(straight, "train/loss")) == list(range(1, STEPS + 1))
    check_evaluation(straight, STEPS, mini_imagenet.VALIDATION)


@pytest.mark.docs
def test_trains_and_evaluates_from_folders(train, folder_dir: Path, tmp_path: Path) -> None:
    train(
        tmp_path,
        "--config.data.source=folder",
        f"--config.data.dir={folder_dir}",
        "--config.steps=1",
        "--config.data.workers=0",
    )
    check_evaluation(tmp_path, 1, len(open_source("folder", "", str(folder_dir), train=False)))


@pytest.mark.slow
def test_resumes_bit_exactly_in_mid_epoch_with_other_workers(
    train, straight: Path, tfds_dir: Path, tmp_path: Path
) -> None:
    workdir = shutil.copytree(straight, tmp_path / "run")
    for checkpoint in (workdir / "checkpoints").iterdir():  # as if it had been killed after STOP
        if int(checkpoint.name) != STOP:
            shutil.rmtree(checkpoint)
    output = train(
        workdir,
        f"--config.data.dir={tfds_dir}",
        f"--config.steps={STEPS}",
        "--config.data.workers=2",
    )
    assert f"continuing after step {STOP}" in output
    assert digests(workdir, STEPS) == digests(straight, STEPS)
    for key in ("train/loss", "train/learning_rate"):
        assert values(workdir, key) == values(straight, key)
    for key in ("eval/loss", "eval_ema/loss"):
        assert values(workdir, key)[STEPS] == values(straight, key)[STEPS]


@pytest.fixture(scope="module")
def published(random_variables, tmp_path_factory) -> Callable[[str], Path]:
    """A training checkpoint in the published form, of a narrow variant with random weights."""

    def write(name: str) -> Path:
        variables = random_variables(
            create_model(name, num_classes=1000, **TWO_STAGES), image_size=64
        )
        state = {k: torch.from_numpy(v) for k, v in torch_weights.to_torch(variables).items()}
        path = tmp_path_factory.mktemp(name) / "checkpoint.pth"
        contents = {
            "model": state,
            "model_ema": state,
            "optimizer": {"state": {}, "param_groups": [{"lr": 1e-5}]},
            "lr_scheduler": {"updates": 300},
            "scaler": {"scale": 65536.0},
            "epoch": 299,
            "max_accuracy": 83.6,
            "args": argparse.Namespace(model=name, batch_size=128, mixup=0.8),
        }
        torch.save(contents, path)
        return path

    return write


def published_commands() -> list[str]:
    """The twelve of the README."""
    text = (ROOT / "README.md").read_text()
    block = text.split("<!-- published -->")[1].split("<!-- end -->")[0]
    return [line.strip() for line in block.strip().splitlines()]


def test_the_readme_has_the_twelve_commands() -> None:
    commands = published_commands()
    found = [re.search(r"(stvit_\w+)\.py(:384)?", command).groups("") for command in commands]
    expected = [(f"stvit_{n}", arg) for n in ("small", "base", "large") for arg in ("", ":384")]
    assert sorted(found) == sorted(2 * expected)
    assert sum("eval_only=True" in command for command in commands) == 6
    assert len({command.split("--workdir ")[1].split()[0] for command in commands}) == 12
    for command, (name, argument) in zip(commands, found, strict=True):
        config, workdir, _ = command_line.train(shlex.split(command)[2:], "")
        assert (config.model.name, config.image_size) == (name, int(argument[1:] or 224))
        assert config.eval_only == Path(workdir).name.startswith("eval_")
        assert bool(config.init_from) == (config.eval_only or argument == ":384")


@pytest.mark.slow
@pytest.mark.parametrize("command", published_commands())
def test_a_published_command(
    published, tfds_dir: Path, compiled: dict[str, str], tmp_path: Path, command: str
) -> None:
    """Each on a narrow network and one small batch, at the recipe's resolution."""
    run_published_command(command, published, tfds_dir, compiled, tmp_path)


# Every config once, as the documentation has it: five evaluate, one fine-tunes; one that trains is
# `test_trains_and_evaluates_from_tfds`.
@pytest.mark.docs
@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 11])
def test_a_published_command_at_64_pixels(
    published, tfds_dir: Path, compiled: dict[str, str], tmp_path: Path, number: int
) -> None:
    command = published_commands()[number]
    run_published_command(
        command, published, tfds_dir, compiled, tmp_path, "--config.image_size=64"
    )


def run_published_command(
    command: str,
    published: Callable,
    tfds_dir: Path,
    compiled: dict[str, str],
    tmp_path: Path,
    *more: str,
) -> None:
    python, script, *arguments = shlex.split(command)
    assert (python, script) == ("python", "train.py")
    config_flag, config, workdir_flag, workdir, *rest = arguments
    assert (config_flag, workdir_flag) == ("--config", "--workdir")
    workdir, flags = tmp_path / workdir, []
    for flag in rest:
        name, value = flag.split("=")
        if value.endswith(".pth"):
            value = published(re.search(r"stvit_\w+(?=\.py)", config).group())
        flags.append(f"{name}={value}")
    eval_only = "--config.eval_only=True" in flags
    program = Program(
        workdir,
        *NARROW,
        *flags,
        *more,
        f"--config.data.dir={tfds_dir}",
        "--config.data.workers=0",
        "--config.steps=1",
        "--config.batch_size=8",
        "--config.group_size=4",
        config=config,
        **compiled,
    )
    assert program.wait(600) == 0, program.output
    assert ("checkpoint.pth" in program.output) == ("init_from" in command)
    assert values(workdir, "eval/count") == {0 if eval_only else 1: mini_imagenet.VALIDATION}
    assert bool(values(workdir, "train/loss")) != eval_only
