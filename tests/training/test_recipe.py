"""The recipe: the configs are the published table, and what a config says reaches the training."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from stvit_jax import config as configs
from stvit_jax import plans, tasks, validation
from stvit_jax.augment import augment_batch
from stvit_jax.data.order import Order
from stvit_jax.training.meter import Plan
from tests.program import NARROW_SETTINGS

TRAIN = {
    "image_size": 224,
    "epochs": 300,
    "batch_size": 1024,
    "group_size": 128,
    "learning_rate": 5e-4,
    "min_learning_rate": 1e-5,
    "warmup_learning_rate": 1e-6,
    "warmup_epochs": 5,
    "weight_decay": 0.05,
    "freeze_batch_norm": False,
    "drop_path_schedule": (),
}
FINE_TUNE = TRAIN | {
    "image_size": 384,
    "epochs": 30,
    "batch_size": 512,
    "group_size": 64,
    "learning_rate": 5e-6,
    "min_learning_rate": 5e-6,
    "warmup_epochs": 0,
    "weight_decay": 1e-8,
    "freeze_batch_norm": True,
}
ALWAYS = {
    "ema_decay": 0.99996,
    "label_smoothing": 0.1,
    "augment.randaugment": True,
    "augment.erasing_probability": 0.25,
    "augment.mixup": True,
    "data.repeats": 3,
    "data.flip": True,
    "data.source": "tfds",
    "data.name": "imagenet2012",
    "dtype": "bfloat16",
    "steps": 0,
    "gradient_accumulation": 1,
    "gradient_clip": 0.0,
    "remat": (),
}
DROP_PATH = {"stvit_small": 0.1, "stvit_base": 0.4, "stvit_large": 0.4}


@pytest.mark.parametrize("name", DROP_PATH)
@pytest.mark.parametrize("argument", ["", "384"])
def test_the_configs_are_the_published_commands(name: str, argument: str) -> None:
    config = importlib.import_module(f"configs.{name}").get_config(argument)
    validation.validate(config)
    expected = ALWAYS | (FINE_TUNE if argument else TRAIN)
    expected |= {"model.name": name, "model.drop_path_rate": DROP_PATH[name]}
    if (name, argument) == ("stvit_large", ""):
        expected["drop_path_schedule"] = ((260, 0.6),)  # of 300 epochs: the last 40
    assert {field: configs.field_of(config, field) for field in expected} == expected


def base_of_a_run(digits_dir: Path) -> ConfigDict:
    config = configs.base()
    config.model.name = "stvit_tiny"
    config.model.update(NARROW_SETTINGS)
    config.data.name, config.data.dir, config.data.workers = "digits", str(digits_dir), 0
    config.image_size, config.batch_size, config.group_size = 32, 64, 16
    return config


def mesh() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))


def partial_of(function: Callable) -> dict[str, Any]:
    """What the functions of a task were made with, by name."""
    contents = (cell.cell_contents for cell in function.__closure__)
    return dict(zip(function.__code__.co_freevars, contents, strict=True))


def test_every_field_reaches_the_task(digits_dir: Path) -> None:
    """With values that are nobody's default."""
    config = base_of_a_run(digits_dir)
    config.epochs, config.label_smoothing = 9, 0.2
    config.augment.erasing_probability, config.augment.randaugment = 0.15, False
    config.data.repeats, config.data.flip = 2, False
    config.model.drop_path_rate, config.drop_path_schedule = 0.3, ((4, 0.7),)
    config.freeze_batch_norm, config.remat = True, (0, 2)
    task = tasks.build(config, mesh())

    made, (augment,) = partial_of(task.objective), task.prepare.args
    assert made["model"].group_size == 16 and made["model"].num_classes == 10
    assert made["model"].remat == (0, 2)
    assert made["model"].dtype == jnp.bfloat16 and made["freeze_batch_norm"] is True
    steps = 1437 // 256 * 256 // 64
    rates = [made["drop_path"](n) for n in (0, 4 * steps - 1, 4 * steps)]
    assert rates == [0.3, 0.3, 0.7]
    assert augment.func is augment_batch and augment.args == ()
    assert augment.keywords == {
        "num_classes": 10,
        "group_size": 16,
        "label_smoothing": 0.2,
        "randaugment": False,
        "erasing_probability": 0.15,
        "mixup": True,
        "mesh": None,
    }
    assert task.classes == tuple("0123456789") and task.what == "stvit_tiny"
    assert len(task.train.source) == 1437
    assert task.train.load.keywords == {"image_size": 32, "flip": False, "classes": 10}
    (evaluation,) = task.evaluations
    assert len(evaluation.examples.source) == 360 and evaluation.name == "eval"


def test_every_field_reaches_the_run(digits_dir: Path) -> None:
    config = base_of_a_run(digits_dir)
    config.data.repeats, config.epochs, config.seed, config.steps = 2, 9, 5, 70
    config.learning_rate, config.min_learning_rate = 3e-4, 2e-5
    config.warmup_learning_rate, config.warmup_epochs = 7e-6, 3
    config.weight_decay, config.ema_decay = 0.03, 0.9
    config.log_every, config.eval_every_epochs, config.checkpoint_every = 3, 2, 11
    config.data.max_bad_fraction = 0.5
    made = plans.Plans.of(config, tasks.build(config, mesh()))
    assert made.order == Order(1437, 64, 16, 2, 5)
    steps = 1437 // 256 * 256 // 64
    assert made.plan == Plan(70, steps, 64, 3, 2 * steps, 11, 0.5)
    rate = made.learning_rate
    assert rate(0) == rate(2 * steps - 1) == 7e-6
    base = 3e-4 * 64 / 512
    assert rate(2 * steps) == pytest.approx(7e-6 + (base - 7e-6) / 3, rel=1e-12)
    assert rate(10**6) == rate(9 * steps - 1) < base
    # One step of the optimiser with a gradient of zero: what is left is the decay.
    params = {"kernel": jnp.ones(3)}
    updates, _ = made.tx.update({"kernel": jnp.zeros(3)}, made.tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -7e-6 * 0.03, rtol=1e-6)


@pytest.mark.parametrize("freeze, group_size", [(False, 16), (True, 0)])
def test_parts_and_clipping_reach_the_step(
    digits_dir: Path, monkeypatch: pytest.MonkeyPatch, freeze: bool, group_size: int
) -> None:
    config = base_of_a_run(digits_dir)
    config.gradient_accumulation, config.freeze_batch_norm = 2, freeze
    config.gradient_clip = 0.25
    task, over = tasks.build(config, mesh()), mesh()
    given = []
    monkeypatch.setattr(plans, "accumulated", lambda *args: given.extend(args))
    plans.train_step_of(config, task, None, over)
    assert given == [task.objective, 2, group_size, over]
    # What Adam sees of a gradient of length 2: the first moment is a tenth of it.
    tx, params = plans.Plans.of(config, task).tx, {"kernel": jnp.zeros(1)}
    _, state = tx.update({"kernel": jnp.full(1, 2.0)}, tx.init(params), params)
    np.testing.assert_allclose(state[1][0].mu["kernel"], 0.025, rtol=1e-6)


def test_the_published_augmentation_is_on(digits_dir: Path) -> None:
    (augment,) = tasks.build(base_of_a_run(digits_dir), mesh()).prepare.args
    on = {"randaugment": True, "erasing_probability": 0.25, "mixup": True, "label_smoothing": 0.1}
    assert augment.keywords.items() >= on.items()
    assert jax.device_count() == 1 and augment.keywords["mesh"] is None
