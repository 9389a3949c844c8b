"""The ImageNet recipe through train.py: tfds's own imagenet2012 in miniature, and class folders."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stvit_jax.data.sources import open_source
from tests import mini_imagenet
from tests.program import NARROW, Program, digests, values

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
# The tests' own choice, not the program's: less of a compiler's time.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mini_imagenet.prepare(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="module")
def folder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mini_imagenet.write_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs train.py to its end; returns what it printed. Compiled programs are shared."""
    cache = str(tmp_path_factory.mktemp("compiled"))

    def train(workdir: Path, *flags: str) -> str:
        program = Program(
            workdir,
            *SMALL,
            *flags,
            config="configs/stvit_small.py",
            JAX_COMPILATION_CACHE_DIR=cache,
            XLA_FLAGS=QUICK,
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


def test_both_sources_hold_the_same_pictures(tfds_dir: Path, folder_dir: Path) -> None:
    for split in (True, False):
        prepared = open_source("tfds", "imagenet2012", str(tfds_dir), train=split)
        folders = open_source("folder", "", str(folder_dir), train=split)
        assert prepared.class_names == folders.class_names and prepared.num_classes == 1000
        pictures = [
            sorted((label, data) for data, label in source) for source in (prepared, folders)
        ]
        if split:
            assert len(pictures[0]) == mini_imagenet.TRAIN and pictures[0] == pictures[1]
        else:
            assert len(pictures[0]) == mini_imagenet.VALIDATION
            assert set(pictures[0]) <= set(pictures[1])


def test_trains_and_evaluates_from_tfds(straight: Path) -> None:
    assert list(values(straight, "train/loss")) == list(range(1, STEPS + 1))
    check_evaluation(straight, STEPS, mini_imagenet.VALIDATION)


def test_trains_and_evaluates_from_folders(train, folder_dir: Path, tmp_path: Path) -> None:
    train(
        tmp_path,
        "--config.data.source=folder",
        f"--config.data.dir={folder_dir}",
        "--config.steps=1",
        "--config.data.workers=0",
    )
    check_evaluation(tmp_path, 1, len(open_source("folder", "", str(folder_dir), train=False)))


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
