"""Configs of other sets, as tfds's builders and the command for MNIST's format write them."""

from pathlib import Path

import numpy as np
import pytest

from stvit_jax.data import mnist
from stvit_jax.data.sources import open_source
from tests.data.test_mnist import write_idx
from tests.mini_sets import picture, prepare
from tests.program import NARROW, Program, values

IMAGES = 24


def cifar100(data_dir: Path) -> None:
    examples = [
        {"id": str(i), "image": picture(i, (32, 32), "PNG"), "label": i, "coarse_label": i % 20}
        for i in range(IMAGES)
    ]
    prepare("cifar100", data_dir, {"train": examples, "test": examples[: IMAGES // 2]})


def inat2018(data_dir: Path) -> None:
    examples = [
        {"id": str(i), "image": picture(i), "label": 300 * i, "supercategory": 0}
        for i in range(IMAGES)
    ]
    prepare(
        "i_naturalist2018",
        data_dir,
        {"train": examples, "validation": examples[: IMAGES // 2], "test": examples[:1]},
    )


def fashion_mnist(data_dir: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("t10k", IMAGES // 2)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        write_idx(data_dir / f"{split}-images-idx3-ubyte.gz", images)
        labels = (np.arange(count) % 10).astype(np.uint8)
        write_idx(data_dir / f"{split}-labels-idx1-ubyte.gz", labels)
    mnist.main([str(data_dir), str(data_dir / "folders")])
    for split in ("train", "val"):
        (data_dir / "folders" / split).rename(data_dir / split)


@pytest.mark.docs
@pytest.mark.parametrize(
    ("write", "config", "source", "name", "classes", "flags"),
    [
        (cifar100, "cifar100", "tfds", "cifar100", 100, ()),
        pytest.param(
            *(inat2018, "inat2018", "tfds", "i_naturalist2018", 8142),
            ("--config.image_size=64",),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(fashion_mnist, "fashion_mnist", "folder", "", 10),
            # Which CIFAR-100's compiles, too.
            ("--config.augment.randaugment=False",),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["cifar100", "inat2018", "fashion_mnist"],
)
def test_a_config_trains_and_evaluates(
    write, config: str, source: str, name: str, classes: int, flags: tuple[str, ...], tmp_path: Path
) -> None:
    write(tmp_path)
    workdir = tmp_path / "run"
    program = Program(
        workdir,
        *NARROW,
        *flags,
        f"--config.data.dir={tmp_path}",
        "--config.data.workers=0",
        "--config.batch_size=8",
        "--config.group_size=4",
        "--config.epochs=5",
        "--config.steps=2",
        "--config.log_every=1",
        config=f"configs/{config}.py",
    )
    assert program.wait() == 0, program.output
    assert f"{IMAGES} images to train on, {IMAGES // 2} to evaluate on" in program.output
    assert len(values(workdir, "train/loss")) == 2
    assert values(workdir, "eval/count") == values(workdir, "eval_ema/count") == {2: IMAGES // 2}
    assert open_source(source, name, str(tmp_path), train=True).num_classes == classes
