"""Learning from a batch in parts: equal to the batch at once, on one device and on several."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, Mesh

import stvit_jax
from benchmarks.hlo import collectives
from stvit_jax.augment import augment_batch
from stvit_jax.tasks import classification
from stvit_jax.training import step as training
from stvit_jax.training.gradients import accumulated, split
from stvit_jax.training.task import Batch, step_keys
from tests.program import TWO_STAGES

ROOT = Path(__file__).parents[2]
BATCH, GROUP, SIZE = 16, 2, 32
KEY = jax.random.key(0)
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
MIX_ONLY = {"randaugment": False, "erasing_probability": 0.0}

pytestmark = pytest.mark.usefixtures("x64")


def devices(count: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()[:count]), ("data",))


def batch(size: int = BATCH) -> Batch:
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (size, SIZE, SIZE, 3)), jnp.uint8),
        "label": jnp.asarray(rng.integers(0, 10, size), jnp.int32),
        "unreadable": jnp.asarray([0] * (size - 3) + [2, 1, 0], jnp.int32),
    }


def augmentation(group_size: int, mesh: Mesh, **augment: Any) -> Callable:
    augment = {"num_classes": 10, "group_size": group_size} | augment
    over = mesh if mesh.size > 1 else None
    return partial(classification.prepare, partial(augment_batch, mesh=over, **augment))


def program(
    draw: Callable,
    prepare: Callable,
    parts: int,
    mesh: Mesh,
    group_size: int = GROUP,
    freeze: bool = False,
) -> tuple[training.TrainState, Callable]:
    """A state and its step, with drop path; SGD, which divides no noise by an epsilon."""
    model = stvit_jax.create_model(
        "stvit_tiny", **TWO_STAGES, group_size=group_size, dtype=jnp.float64
    )
    tx = optax.sgd(1e-3, momentum=0.9)
    variables = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.int32 if x.dtype == np.int32 else jnp.float64), draw(model)
    )
    state = training.TrainState(
        step=jnp.zeros((), jnp.int32),
        opt_state=tx.init(variables["params"]),
        ema=variables,
        **variables,
    )
    objective = classification.objective(model, lambda step: 0.3, freeze)
    gradients = accumulated(objective, parts, 0 if freeze else group_size, mesh)
    return state, training.make_train_step(prepare, gradients, tx, ema_decay=0.9)


def two_steps(state: training.TrainState, step: Callable, prepared: Callable | None = None) -> Any:
    """State and metrics after them; `prepared` augments outside of the step, if given."""
    step = jax.jit(step)
    for number in range(2):
        given = batch()
        if prepared:
            given |= prepared(given, step_keys(KEY, number)[0])
        state, metrics = step(state, given, KEY)
    return state, metrics


def assert_equal(ours: Any, theirs: Any, atol: float) -> None:
    def leaf(path: tuple, a: jax.Array, b: jax.Array) -> None:
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(leaf, ours, theirs)


def as_given(batch: Batch, key: jax.Array) -> Batch:
    return {"image": batch["image"], "target": batch["target"]}


@pytest.mark.docs
def test_a_batch_in_parts_is_learned_as_the_batch_at_once(random_variables) -> None:
    """The published augmentation, drop path and groups: state and metrics are the same.

    Augmentation is float32, and XLA rounds it as it fuses it; so it is one program for the first
    comparison, and within the step, as training has it, for the second.
    """
    prepare, mesh = augmentation(GROUP, devices(1)), devices(1)
    once = jax.jit(prepare)
    start, step = program(random_variables, as_given, 1, mesh)
    state, metrics = expected = two_steps(start, step, once)
    result = two_steps(*program(random_variables, as_given, BATCH // GROUP, mesh), once)
    assert_equal(result, expected, atol=1e-12)
    assert_equal(two_steps(*program(random_variables, prepare, 2, mesh)), expected, atol=1e-8)
    assert int(metrics["unreadable"]) == 2
    counts = {int(x) for x in jax.tree.leaves(state.batch_stats) if x.dtype == jnp.int32}
    assert counts == {2}


@pytest.mark.slow
def test_frozen_statistics_stay_as_they_are_and_bind_no_group(random_variables) -> None:
    """A third of a sum of three is not always the number; frozen statistics must be."""
    prepare, mesh = augmentation(0, devices(1), **MIX_ONLY), devices(1)
    start, step = program(random_variables, as_given, 1, mesh, 0, freeze=True)
    expected = two_steps(start, step, jax.jit(prepare))
    start, step = program(random_variables, as_given, BATCH, mesh, 0, freeze=True)
    state, _ = result = two_steps(start, step, jax.jit(prepare))
    assert_equal(result, expected, atol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, start.batch_stats)
    assert not np.array_equal(state.params["head"]["bias"], start.params["head"]["bias"])


@pytest.mark.slow
def test_parts_take_less_memory(random_variables) -> None:
    mesh = devices(1)
    prepare = augmentation(GROUP, mesh, mixup=False, **MIX_ONLY)

    def temporaries(parts: int) -> int:
        state, step = program(random_variables, prepare, parts, mesh)
        compiled = training.compile_step(step, state, batch(), KEY, mesh=mesh, donate=True)
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8) < temporaries(1) / 2


def test_means_counters_rows_and_dtypes() -> None:
    """Of an objective whose gradients are known."""

    def objective(params, batch_stats, batch, key, step):
        mean = jnp.mean(batch["x"])
        stats = {"count": batch_stats["count"] + 1, "mean": batch_stats["mean"] * 0.5 + mean}
        return params["w"] * mean, (stats, {"row": jnp.mean(batch["row"] * 1.0)})

    x = jnp.arange(12, dtype=jnp.float32) ** 2
    (loss, (stats, scalars)), grads = jax.jit(accumulated(objective, 3, 2, devices(1)))(
        {"w": jnp.float32(2)},
        {"count": jnp.int32(2**31 - 2), "mean": jnp.float32(8)},
        {"x": x, "row": jnp.arange(12)},
        KEY,
        0,
    )
    mean = np.mean(np.arange(12.0) ** 2)
    results = [loss, grads["w"], stats["mean"], scalars["row"]]
    np.testing.assert_allclose(results, [2 * mean, mean, 4 + mean, 5.5], rtol=1e-6)
    assert (int(stats["count"]), stats["count"].dtype) == (2**31 - 1, jnp.int32)
    assert loss.dtype == grads["w"].dtype == stats["mean"].dtype == jnp.float32


@pytest.mark.parametrize(
    "mesh_size, group_size, first",
    [
        (1, 2, [0, 1, 2, 3, 4, 5, 6, 7]),
        (2, 2, [0, 1, 2, 3, 8, 9, 10, 11]),  # half of what each device has
        (4, 1, [0, 1, 4, 5, 8, 9, 12, 13]),
        (8, 0, [0, 2, 4, 6, 8, 10, 12, 14]),
        (4, 4, [0, 1, 2, 3, 8, 9, 10, 11]),  # a group is all that a device has: groups move
        (2, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_a_part_is_of_whole_groups_of_each_device(
    monkeypatch, mesh_size: int, group_size: int, first: list[int]
) -> None:
    monkeypatch.setattr(jax.lax, "with_sharding_constraint", lambda x, _: x)
    mesh = AbstractMesh((mesh_size,), ("data",))
    parts = split({"x": jnp.arange(16)}, 2, group_size, mesh)["x"]
    np.testing.assert_array_equal(parts[0], first)
    np.testing.assert_array_equal(np.sort(parts.ravel()), np.arange(16))


@pytest.mark.slow
def test_devices_keep_their_images_and_learn_the_same() -> None:
    """Images stay where a group is of one device; where it is of two, some move."""
    result = subprocess.run(
        [sys.executable, "-c", "from tests.training import test_accumulation as t; t.main()"],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {EIGHT_DEVICES}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    within, across = map(ast.literal_eval, result.stdout.splitlines())
    assert within == ["all-reduce"]
    assert "all-reduce" in across  # of norms; they show that the program is one of many devices


def main() -> None:
    """Prints the kinds of collectives of a step in parts on eight devices, by group size."""
    jax.config.update("jax_enable_x64", True)
    given, one, eight = batch(32), devices(1), devices(8)
    for group_size in (2, 8):  # a device has four images

        def draw(model: Any) -> Any:
            images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
            return jax.jit(lambda key: model.lazy_init(key, images))(KEY)

        mixed = augmentation(group_size, one, **MIX_ONLY)
        prepared = given | jax.jit(mixed)(given, KEY)
        start, step = program(draw, as_given, 1, one, group_size)
        expected = jax.jit(step)(start, prepared, KEY)
        start, step = program(draw, as_given, 2, eight, group_size)
        compiled = training.compile_step(step, start, prepared, KEY, mesh=eight, donate=False)
        assert_equal(compiled(start, prepared, KEY), expected, atol=1e-12)
        print(sorted({c.kind for c in collectives(compiled.as_text())}))
