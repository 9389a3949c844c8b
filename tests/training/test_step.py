"""The pure training step: what it changes and what it leaves alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import stvit_jax
from stvit_jax.augment import augment_batch
from stvit_jax.tasks import accuracy, classification
from stvit_jax.training import optimizer
from stvit_jax.training import step as training
from stvit_jax.training.gradients import at_once

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (16, 32, 32, 3)), jnp.uint8),
        "label": jnp.asarray(rng.integers(0, 10, 16), jnp.int32),
        "unreadable": jnp.asarray([0] * 13 + [2, 1, 0], jnp.int32),
    }


def augment(key, images, labels):
    return augment_batch(
        key,
        images,
        labels,
        num_classes=10,
        randaugment=False,
        erasing_probability=0.0,
        mixup=False,
    )


@pytest.fixture(scope="module")
def model():
    return stvit_jax.create_model(
        "stvit_tiny",
        embed_dim=(8, 8, 16, 16),
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 2, 2),
        projection=16,
    )


@pytest.fixture(scope="module")
def make(model, random_variables):
    """A state and its compiled step; drop path goes from 0 to 0.9 at step 100."""
    tx = optimizer.adamw(lambda step: 1e-2, 0.05)

    def make(freeze):
        variables = jax.tree.map(jnp.asarray, random_variables(model))
        state = training.TrainState(
            step=jnp.zeros((), jnp.int32),
            opt_state=tx.init(variables["params"]),
            ema=variables,
            **variables,
        )
        step = training.make_train_step(
            partial(classification.prepare, augment),
            at_once(
                classification.objective(
                    model, lambda step: jnp.where(step < 100, 0.0, 0.9), freeze
                )
            ),
            tx,
            ema_decay=0.9,
        )
        return state, jax.jit(step)

    return make


@pytest.fixture(scope="module")
def plain(make):
    return make(freeze=False)


def moved(before, after):
    """Whether any leaf is not equal."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return [not np.array_equal(a, b) for a, b in pairs]


class Noisy(nn.Module):
    """In the place of the network, where only the keys matter: its output shows them."""

    in_chans: int = 3

    @nn.compact
    def __call__(self, images, train=False, drop_path_rate=0.0, rows=None):
        count = self.variable("batch_stats", "count", jnp.zeros, ())
        noise = jax.random.uniform(self.make_rng("dropout")) if train else 0.0
        return nn.Dense(10)(images.mean((1, 2)) + noise) + count.value


@pytest.mark.parametrize("part", ["augmentation", "drop path"])
def test_keys_differ_between_steps_and_between_seeds(batch, part):
    model, tx = Noisy(), optimizer.adamw(lambda step: 1e-3, 0.0)

    def noisy(key, images, labels):
        shift = jax.random.uniform(key) if part == "augmentation" else 0.0
        return stvit_jax.data.normalize(images) + shift, jax.nn.one_hot(labels, 10)

    def loss(step, seed):
        objective = classification.objective(
            model, lambda step: 0.0, freeze_batch_norm=part == "augmentation"
        )
        train_step = training.make_train_step(
            partial(classification.prepare, noisy), at_once(objective), tx, ema_decay=0.0
        )
        key = jax.random.key(0)
        variables = jax.jit(model.init)(key, jnp.zeros((1, 32, 32, 3)))
        state = training.TrainState(
            jnp.int32(step), **variables, opt_state=tx.init(variables["params"]), ema={}
        )
        return float(jax.jit(train_step)(state, batch, jax.random.key(seed))[1]["loss"])

    losses = [loss(step, seed) for step, seed in ((0, 0), (1, 0), (0, 1), (1, 1))]
    assert len(set(losses)) == 4
    assert loss(1, 0) == losses[1]


def test_a_step_moves_everything_and_counts(plain, batch):
    state, step = plain
    new, metrics = step(state, batch, KEY)
    assert int(new.step) == 1 and int(metrics["unreadable"]) == 2
    assert np.isfinite(metrics["loss"])
    assert all(moved(state.batch_stats, new.batch_stats))
    assert np.mean(moved(state.params, new.params)) > 0.9
    expected = jax.tree.map(
        lambda e, v: (0.9 * e + 0.1 * v).astype(e.dtype), state.ema, new.variables
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), new.ema, expected
    )


@pytest.mark.slow
def test_the_norm_of_the_gradient_is_that_before_clipping(model, plain, batch):
    state, step = plain
    tx = optimizer.adamw(lambda step: 1e-2, 0.05, gradient_clip=1e-3)
    clipped = training.make_train_step(
        partial(classification.prepare, augment),
        at_once(classification.objective(model, lambda step: 0.0, False)),
        tx,
        ema_decay=0.9,
    )
    new, metrics = jax.jit(clipped)(state.replace(opt_state=tx.init(state.params)), batch, KEY)
    expected = step(state, batch, KEY)[1]["gradient_norm"]
    np.testing.assert_allclose(metrics["gradient_norm"], expected, rtol=1e-5)
    assert expected > 0.01
    taken = optax.tree.norm(new.opt_state[1][0].mu) / 0.1  # the first moment is a tenth of it
    np.testing.assert_allclose(taken, 1e-3, rtol=1e-4)


def test_the_loss_falls_on_a_batch_seen_again(plain, batch):
    state, step = plain
    losses = []
    for _ in range(15):
        state, metrics = step(state, batch, KEY)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]


def test_drop_path_follows_the_step_without_a_new_program(plain, batch):
    state, step = plain

    def loss(at):
        return float(step(state.replace(step=jnp.int32(at)), batch, KEY)[1]["loss"])

    assert loss(0) == loss(99)  # no masks, and nothing else is random here
    assert loss(100) != loss(0) and loss(100) != loss(101)
    assert step._cache_size() == 1


@pytest.mark.docs
def test_frozen_batch_norm_keeps_statistics_and_trains_scales(model, make, batch):
    state, step = make(freeze=True)
    new, metrics = step(state.replace(step=jnp.int32(100)), batch, KEY)
    assert not any(moved(state.batch_stats, new.batch_stats))
    norm = new.params["layers_0"]["blocks_0"]["norm2"]
    assert all(moved(state.params["layers_0"]["blocks_0"]["norm2"], norm))
    # Inference mode: drop path is off, whatever its rate.
    images, targets = augment(jax.random.key(0), batch["image"], batch["label"])
    logits = jax.jit(model.apply)(state.variables, images)
    loss = -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), -1))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)


def test_evaluation_counts_masked_images_and_unreadable_ones_as_wrong(
    model, random_variables, batch
):
    variables = random_variables(model)
    images = stvit_jax.data.normalize(batch["image"])
    logits = np.asarray(jax.jit(model.apply)(variables, images))
    ranks = np.argsort(np.argsort(-logits, axis=-1), axis=-1)
    rank = ranks[np.arange(16), batch["label"]]
    mask, readable = np.arange(16) < 13, np.arange(16) != 4
    unreadable = jnp.asarray(~readable, jnp.int32)
    sums = jax.jit(partial(accuracy.measure, model))(
        variables, batch | {"mask": jnp.asarray(mask), "unreadable": unreadable}
    )
    valid = mask & readable
    assert int(sums["count"]) == 13 and int(sums["unreadable"]) == 1
    assert int(sums["top1"]) == np.sum((rank < 1) & valid)
    assert int(sums["top5"]) == np.sum((rank < 5) & valid)
    losses = -np.asarray(jax.nn.log_softmax(logits))[np.arange(16), batch["label"]]
    np.testing.assert_allclose(sums["loss"], losses[valid].sum(), rtol=1e-5)
