"""Other sets of tfds by their names: what their own builders write trains and evaluates."""

from pathlib import Path

import pytest

from stvit_jax.data.sources import open_source
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


@pytest.mark.parametrize(
    ("write", "config", "classes", "flags"),
    [
        (cifar100, "cifar100", 100, ()),
        (inat2018, "inat2018", 8142, ("--config.image_size=64",)),
    ],
    ids=["cifar100", "inat2018"],
)
def test_a_config_trains_and_evaluates(
    write, config: str, classes: int, flags: tuple[str, ...], tmp_path: Path
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
    name = {"inat2018": "i_naturalist2018"}.get(config, config)
    assert open_source("tfds", name, str(tmp_path), train=True).num_classes == classes
