"""Learning rate and drop path by step."""

import json

import jax
import jax.numpy as jnp
import pytest

from stvit_jax import schedules

RECIPES = {  # base, minimum, warm-up from, warm-up epochs, epochs
    "train_300_lr1e-3": (1e-3, 1e-5, 1e-6, 5, 300),
    "finetune_30": (5e-6, 5e-6, 5e-6, 0, 30),
    "train_20_warm3": (1e-3, 1e-5, 1e-6, 3, 20),
}


@pytest.fixture(scope="module")
def golden(data_dir):
    return json.loads((data_dir / "lr_per_epoch.json").read_text())


def test_every_golden_schedule_is_known(golden):
    assert len(golden) == len(RECIPES)


@pytest.mark.parametrize("recipe", range(3))
def test_learning_rate_of_every_epoch_is_the_published_one(golden, recipe):
    rates = list(golden.values())[recipe]
    rate = schedules.learning_rate(*list(RECIPES.values())[recipe], steps_per_epoch=7)
    for epoch, expected in enumerate(rates):
        for step in (7 * epoch, 7 * epoch + 6):
            assert rate(step) == pytest.approx(expected, rel=1e-12), epoch


def test_traced_steps_give_the_same_numbers():
    rate = schedules.learning_rate(1e-3, 1e-5, 1e-6, 3, 20, 5)
    traced = jax.jit(jax.vmap(rate))(jnp.arange(110))
    assert traced.tolist() == pytest.approx([rate(step) for step in range(110)], rel=1e-6)


def test_drop_path_changes_at_its_epochs():
    rate = schedules.drop_path(0.4, ((260, 0.6),), epochs=300, steps_per_epoch=10)
    assert [rate(0), rate(2599), rate(2600), rate(2999)] == [0.4, 0.4, 0.6, 0.6]
    assert schedules.drop_path(0.1, (), 3, 10)(29) == 0.1
