"""Ten optimiser steps next to PyTorch: parameters, running statistics, moving average, losses."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import torch_stvit
from stvit_jax import schedules, torch_weights
from stvit_jax.models.stvit import create_model
from stvit_jax.tasks import classification
from stvit_jax.training import optimizer
from stvit_jax.training import step as training
from stvit_jax.training.gradients import at_once
from tests.parity import assert_close

STEPS, BATCH, SIZE, CLASSES = 10, 4, 64, 10
# The published recipe; the rate changes at steps 4, 6 and 8: two epochs of f(0), then f(1), ...
RECIPE = dict(
    base=5e-4, minimum=1e-5, warmup_from=1e-6, warmup_epochs=2, epochs=8, steps_per_epoch=2
)
# Optimising the program would take longer than ten steps.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
WEIGHT_DECAY, EMA_DECAY, SMOOTHING = 0.05, 0.99996, 0.1


def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    """uint8 images (B, S, S, 3), and labels."""
    rng = np.random.default_rng(0)
    return [
        (
            rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8),
            rng.integers(0, CLASSES, BATCH, np.int32),
        )
        for _ in range(STEPS)
    ]


def augment(key, images, labels):
    """No augmentation: to numbers, labels smoothed."""
    targets = jax.nn.one_hot(labels, CLASSES, dtype=jnp.float64)
    return images / 127.5 - 1.0, targets * (1 - SMOOTHING) + SMOOTHING / CLASSES


def published_rate(step: int) -> float:
    """Timm 0.5.4's cosine schedule, stepped after each epoch."""
    t = max(step // RECIPE["steps_per_epoch"] - 1, 0)
    low, high, total = RECIPE["minimum"], RECIPE["base"], RECIPE["epochs"]
    if t < RECIPE["warmup_epochs"]:
        start = RECIPE["warmup_from"]
        return start + t * (high - start) / RECIPE["warmup_epochs"]
    return low + 0.5 * (high - low) * (1 + np.cos(np.pi * t / total))


def train_torch(settings: dict, state: dict[str, np.ndarray], freeze: bool):
    """As the published script trains; returns losses, state dict, moving average, and updates."""
    model = torch_stvit.STViT(**settings).double()
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})
    model.train(not freeze)
    tx = torch.optim.AdamW(torch_stvit.adamw_groups(model, WEIGHT_DECAY), lr=0.0)
    average = {name: x.clone() for name, x in model.state_dict().items()}
    losses = []
    for step, (images, labels) in enumerate(batches()):
        for group in tx.param_groups:
            group["lr"] = published_rate(step)
        inputs = torch.from_numpy(images).double().permute(0, 3, 1, 2) / 127.5 - 1.0
        logits = model(inputs)
        loss = F.cross_entropy(logits, torch.from_numpy(labels).long(), label_smoothing=SMOOTHING)
        tx.zero_grad()
        loss.backward()
        tx.step()
        losses.append(loss.item())
        with torch.no_grad():
            for name, x in model.state_dict().items():
                average[name].copy_(average[name] * EMA_DECAY + (1.0 - EMA_DECAY) * x)
    as_numpy = [{k: x.numpy() for k, x in d.items()} for d in (model.state_dict(), average)]
    return losses, *as_numpy


def train_jax(settings: dict, state: dict[str, np.ndarray], freeze: bool):
    """Likewise, through `make_train_step`."""
    model = create_model("stvit_small", dtype=jnp.float64, **settings)
    tx = optimizer.adamw(schedules.learning_rate(**RECIPE), WEIGHT_DECAY)
    variables = jax.tree.map(jnp.asarray, torch_weights.from_torch(state))
    train_state = training.TrainState(
        step=jnp.zeros((), jnp.int32),
        opt_state=tx.init(variables["params"]),
        ema=jax.tree.map(jnp.copy, variables),
        **variables,
    )
    step = jax.jit(
        training.make_train_step(
            partial(classification.prepare, augment),
            at_once(classification.objective(model, lambda _: 0.0, freeze)),
            tx,
            EMA_DECAY,
        ),
        compiler_options=QUICK,
    )
    losses = []
    for images, labels in batches():
        batch = {"image": images, "label": labels, "unreadable": np.zeros(BATCH, np.int32)}
        train_state, metrics = step(train_state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    return (
        losses,
        torch_weights.to_torch(train_state.variables),
        torch_weights.to_torch(train_state.ema),
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "freeze",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["training", "freeze_batch_norm"],
)
def test_ten_steps_end_where_pytorch_ends(freeze, data_dir, golden_state):
    settings = json.loads((data_dir / "tiny_config.json").read_text())
    state = golden_state("tiny")
    ours, theirs = (train(settings, state, freeze) for train in (train_jax, train_torch))

    assert_close({"losses": np.array(ours[0])}, {"losses": np.array(theirs[0])})
    for name, before in state.items():
        for which, a, b in zip(("raw", "average"), ours[1:], theirs[1:], strict=True):
            assert a[name].dtype == b[name].dtype
            # Where a gradient is zero in theory, Adam divides noise of 1e-17 by an eps of 1e-8.
            np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-10, err_msg=which + name)
        assert a.keys() == b.keys() == state.keys()

        # What has to move has moved, and what has to stay has stayed.
        kind = name.split(".")[-1]
        constant = "fold" in name or (freeze and kind in ("running_mean", "running_var"))
        if kind == "num_batches_tracked":
            assert theirs[1][name] == ours[1][name] == before + (0 if freeze else STEPS)
        else:
            assert np.array_equal(theirs[1][name], before) == constant, name
            assert np.array_equal(ours[1][name], before) == constant, name


def test_the_rate_changes_within_the_ten_steps():
    rates = [published_rate(step) for step in range(STEPS)]
    assert len(set(rates)) == 4
    assert rates == pytest.approx([schedules.learning_rate(**RECIPE)(s) for s in range(STEPS)])
