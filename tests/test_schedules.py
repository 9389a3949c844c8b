"""Learning rate and drop path by step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvit_jax import schedules
from stvit_jax.errors import UserError

RECIPES = {  # base, minimum, warm-up from, warm-up epochs, epochs
    "train_300_lr1e-3": (1e-3, 1e-5, 1e-6, 5, 300),
    "finetune_30_lr5e-6": (5e-6, 5e-6, 5e-6, 0, 30),
    "train_20_lr1e-3_warm3": (1e-3, 1e-5, 1e-6, 3, 20),
}


@pytest.fixture(scope="module")
def golden(data_dir):
    return json.loads((data_dir / "lr_per_epoch.json").read_text())


def test_every_golden_schedule_is_known(golden):
    assert golden.keys() == RECIPES.keys()


@pytest.mark.parametrize("recipe", RECIPES)
def test_learning_rate_of_every_epoch_is_the_published_one(golden, recipe):
    rate = schedules.learning_rate(*RECIPES[recipe], steps_per_epoch=7)
    assert len(golden[recipe]) == RECIPES[recipe][-1]
    for epoch, expected in enumerate(golden[recipe]):
        for step in (7 * epoch, 7 * epoch + 6):
            assert rate(step) == pytest.approx(expected, rel=1e-12), epoch


def test_traced_steps_and_arrays_give_the_same_numbers():
    rate = schedules.learning_rate(1e-3, 1e-5, 1e-6, 3, 20, 5)
    expected = [rate(step) for step in range(110)]
    traced = jax.jit(jax.vmap(rate))(jnp.arange(110))
    assert traced.tolist() == pytest.approx(expected, rel=1e-6)
    assert rate(np.arange(110)).tolist() == expected
    assert [rate(np.int64(step)) for step in range(110)] == expected


@pytest.mark.parametrize("epochs, steps_per_epoch", [(0, 5), (20, 0), (20, -1)])
def test_a_schedule_without_a_step_is_refused(epochs, steps_per_epoch):
    for schedule in (
        lambda: schedules.learning_rate(1e-3, 1e-5, 1e-6, 3, epochs, steps_per_epoch),
        lambda: schedules.drop_path(0.1, (), epochs, steps_per_epoch),
    ):
        with pytest.raises(UserError, match=f"{epochs} epochs of {steps_per_epoch} steps"):
            schedule()


def test_drop_path_changes_at_its_epochs():
    rate = schedules.drop_path(0.4, ((260, 0.6),), epochs=300, steps_per_epoch=10)
    assert [rate(0), rate(2599), rate(2600), rate(2999)] == [0.4, 0.4, 0.6, 0.6]
    assert schedules.drop_path(0.1, (), 3, 10)(29) == 0.1
    back = schedules.drop_path(0.1, ((2, 0.3), (1, 0.2)), epochs=3, steps_per_epoch=10)
    assert [back(9), back(10), back(20), back(10**6)] == [0.1, 0.2, 0.3, 0.3]


def test_the_polynomial_is_that_of_mmcv():
    rate = schedules.polynomial(6e-5, 0.0, 1.0, 160_000, 1500)
    for step, expected in {
        0: 6.0e-11,
        1: 6e-5 * 159_999 / 160_000 * (1 + 1e-6 * 1499) / 1500,
        1499: 6e-5 * 158_501 / 160_000 * (1499 + 1e-6) / 1500,
        1500: 6e-5 * 158_500 / 160_000,
        80_000: 3e-5,
        159_999: 3.75e-10,
    }.items():
        assert rate(step) == pytest.approx(expected, rel=1e-12, abs=0), step
    assert rate(1) == pytest.approx(4.00597e-8, rel=2e-6)  # as the running schedulers gave them
    assert rate(1499) == pytest.approx(5.93982e-5, rel=2e-6)
    fpn = schedules.polynomial(1e-4, 1e-6, 0.9, 80_000)
    assert fpn(0) == 1e-4 and fpn(40_000) == pytest.approx(1e-6 + 9.9e-5 * 0.5**0.9, rel=1e-12)
    assert fpn(79_999) == pytest.approx(1e-6 + 9.9e-5 / 80_000**0.9, rel=1e-12, abs=0)
