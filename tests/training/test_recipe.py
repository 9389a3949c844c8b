"""The recipe: the configs are the published table, and what a config says reaches the training."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from stvit_jax import config as configs
from stvit_jax import run
from stvit_jax.augment import augment_batch
from stvit_jax.training import optimizer
from stvit_jax.training import step as training
from stvit_jax.training.signals import Stop
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
}
DROP_PATH = {"stvit_small": 0.1, "stvit_base": 0.4, "stvit_large": 0.4}


@pytest.mark.parametrize("name", DROP_PATH)
@pytest.mark.parametrize("argument", ["", "384"])
def test_the_configs_are_the_published_commands(name: str, argument: str) -> None:
    config = importlib.import_module(f"configs.{name}").get_config(argument)
    configs.validate(config)
    expected = ALWAYS | (FINE_TUNE if argument else TRAIN)
    expected |= {"model.name": name, "model.drop_path_rate": DROP_PATH[name]}
    if (name, argument) == ("stvit_large", ""):
        expected["drop_path_schedule"] = ((260, 0.6),)  # of 300 epochs: the last 40
    assert {field: configs.field_of(config, field) for field in expected} == expected


class ReachedError(Exception):
    """Everything is put together; nothing needs to be compiled."""


@pytest.fixture
def assembled(
    monkeypatch: pytest.MonkeyPatch, digits_dir: Path, tmp_path: Path
) -> Callable[[ConfigDict], dict[str, Any]]:
    """Lets `run` put a training together; returns what the parts were given, by their names."""
    seen: dict[str, Any] = {}

    def record(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            seen[name] = (args, kwargs)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    def make_train_step(model: Any, tx: Any, **kwargs: Any) -> None:
        seen["make_train_step"] = ((model, tx), kwargs)
        raise ReachedError

    record(run, "Order")
    record(run, "train_batches")
    record(optimizer, "adamw")
    monkeypatch.setattr(training, "make_train_step", make_train_step)
    monkeypatch.setattr(run, "_compile", lambda *_, **__: None)

    def assembled(config: ConfigDict) -> dict[str, Any]:
        config.model.name = "stvit_tiny"
        config.model.update(NARROW_SETTINGS)
        config.data.name, config.data.dir, config.data.workers = "digits", str(digits_dir), 0
        with pytest.raises(ReachedError):
            run.run(config, tmp_path / "run", Stop())
        return seen

    return assembled


def test_every_field_reaches_the_training(assembled) -> None:
    """With values that are nobody's default."""
    config = configs.base()
    config.image_size, config.batch_size, config.group_size = 32, 64, 16
    config.epochs, config.seed = 9, 5
    config.learning_rate, config.min_learning_rate = 3e-4, 2e-5
    config.warmup_learning_rate, config.warmup_epochs = 7e-6, 3
    config.weight_decay, config.ema_decay, config.label_smoothing = 0.03, 0.9, 0.2
    config.augment.erasing_probability, config.augment.randaugment = 0.15, False
    config.data.repeats, config.data.flip = 2, False
    config.model.drop_path_rate, config.drop_path_schedule = 0.3, ((4, 0.7),)
    config.freeze_batch_norm = True
    seen = assembled(config)

    assert seen["Order"] == ((1437, 64, 16, 2, 5), {})
    steps = 1437 // 256 * 256 // 64
    (source, order), given = seen["train_batches"]
    assert len(source) == 1437 and order.steps_per_epoch == steps
    assert (given["image_size"], given["flip"], given["start"]) == (32, False, 0)
    ((learning_rate, weight_decay), _) = seen["adamw"]
    assert weight_decay == 0.03
    assert learning_rate(0) == learning_rate(2 * steps - 1) == 7e-6
    base = 3e-4 * 64 / 512
    assert learning_rate(2 * steps) == pytest.approx(7e-6 + (base - 7e-6) / 3, rel=1e-12)
    assert learning_rate(10**6) == learning_rate(9 * steps - 1) < base

    (model, _), step = seen["make_train_step"]
    assert model.group_size == 16 and model.num_classes == 10
    assert step["seed"] == 5 and step["ema_decay"] == 0.9 and step["freeze_batch_norm"] is True
    assert [step["drop_path"](n) for n in (0, 4 * steps - 1, 4 * steps)] == [0.3, 0.3, 0.7]
    augment = step["augment"]
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


def test_the_published_augmentation_is_on(assembled) -> None:
    config = configs.base()
    config.image_size, config.batch_size, config.group_size = 32, 64, 16
    augment = assembled(config)["make_train_step"][1]["augment"].keywords
    on = {"randaugment": True, "erasing_probability": 0.25, "mixup": True, "label_smoothing": 0.1}
    assert augment.items() >= on.items()
    assert jax.device_count() == 1 and augment["mesh"] is None
