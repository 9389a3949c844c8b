"""The loop around a step of no weight: what it saves, and with what words it ends."""

from collections.abc import Callable, Iterator
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import pytest

from stvit_jax.checkpoints.manager import Checkpoints
from stvit_jax.errors import Interrupted, UserError
from stvit_jax.training import loop
from stvit_jax.training.meter import Meter, NonFinite, Plan
from stvit_jax.training.metrics import MetricWriter
from stvit_jax.training.signals import Stop
from stvit_jax.training.watchdog import Watchdog
from stvit_jax.training.workdir import Evaluations
from tests.program import values

PLAN = Plan(
    steps=12,
    steps_per_epoch=5,
    batch_size=200,
    log_every=1,
    evaluate_every=5,
    checkpoint_every=100,
    max_bad_fraction=0.1,
)


@flax.struct.dataclass
class State:
    step: jax.Array
    total: jax.Array


@jax.jit
def train_step(state: State, batch: dict, key: jax.Array) -> tuple[State, dict]:
    state = State(state.step + 1, state.total + batch["loss"])
    return state, {key: batch[key] for key in ("loss", "gradient_norm", "unreadable")}


def batches(*losses: float, unreadable: int = 0, fault: str = "") -> Iterator[dict]:
    for loss in losses:
        yield {
            "loss": jnp.float32(loss),
            "gradient_norm": jnp.float32(7),
            "unreadable": jnp.int32(unreadable),
        }
    raise UserError(fault)


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Trains from step `start` on, with real checkpoints; returns the step that it ended with."""
    monkeypatch.setattr(MetricWriter, "_open_tensorboard", lambda self, workdir: None)

    def train(given: Iterator[dict], start: int = 0, evaluate: Callable | None = None) -> int:
        writer = MetricWriter(tmp_path)
        done = Evaluations(tmp_path)

        def evaluated(step: int, state: State) -> None:
            metrics = {"eval/top1": int(state.step) / 100}
            writer.write(step, PLAN.epoch(step), metrics)
            done.add(step, metrics)

        checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
        state, notes = State(jnp.int32(start), jnp.float32(0)), {}
        if start:
            _, state, notes = checkpoints.restore_newest(abstract(state))
        try:
            return loop.train(
                state,
                given,
                waits_for=lambda: "the data",
                plan=PLAN,
                train_step=train_step,
                key=jax.random.key(0),
                evaluate=evaluate or evaluated,
                evaluated=done.of(start) is not None,
                meter=Meter(PLAN, lambda step: 0.1, writer, notes),
                checkpoints=checkpoints,
                stop=Stop(),
                agree=lambda: None,
                watchdog=Watchdog(0),
            )
        finally:
            checkpoints.close()
            writer.close()

    return train


def abstract(state: State) -> State:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def saved(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_a_run_logs_every_step_and_evaluates_every_epoch(train, tmp_path: Path) -> None:
    assert train(batches(*range(12))) == 12
    assert values(tmp_path, "train/loss") == {step: step - 1 for step in range(1, 13)}
    assert values(tmp_path, "eval/top1") == {5: 0.05, 10: 0.1, 12: 0.12}
    assert saved(tmp_path) == [12]


def test_a_fault_of_the_data_saves_the_last_step(train, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^shard 3 is damaged\. Step 7 is saved, the same command"):
        train(batches(*range(7), fault="shard 3 is damaged"))
    assert saved(tmp_path) == [7] and len(values(tmp_path, "train/loss")) == 7


def test_a_fault_before_the_first_step_leaves_nothing(train, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^shard 3 is damaged$"):
        train(batches(fault="shard 3 is damaged"))
    assert saved(tmp_path) == []


def test_a_fault_of_the_evaluation_saves_and_the_evaluation_is_made_up_for(
    train, tmp_path: Path
) -> None:
    def damaged(step: int, state: State) -> None:
        raise UserError("the validation shard is damaged")

    with pytest.raises(UserError, match=r"validation shard is damaged\. Step 5 is saved"):
        train(batches(*range(12)), evaluate=damaged)
    assert saved(tmp_path) == [5]
    with pytest.raises(UserError, match=r"validation shard is damaged$"):
        train(batches(*range(12)), start=5, evaluate=damaged)
    assert train(batches(*range(7)), start=5) == 12
    assert list(values(tmp_path, "eval/top1")) == [5, 10, 12]


def test_a_loss_that_is_not_finite_is_noticed_and_not_saved(train, tmp_path: Path) -> None:
    message = r"loss is nan at step 4 \(learning rate 1.00e-01, norm of the gradient 7\)$"
    with pytest.raises(NonFinite, match=message):
        train(batches(1, 1, 1, float("nan"), 1, 1, 1, 1))
    assert saved(tmp_path) == []


def test_too_many_unreadable_images_stop_the_run_with_the_last_step_saved(
    train, tmp_path: Path
) -> None:
    message = r"^120 of 600 images do not decode, .*max_bad_fraction 0\.1: .* Step 4 is saved"
    with pytest.raises(UserError, match=message):  # above 100 of the first 1,000
        train(batches(*range(12), unreadable=40))
    assert saved(tmp_path) == [4]
    assert values(tmp_path, "train/unreadable") == {1: 40, 2: 80, 3: 120, 4: 160}


def test_counts_of_unreadable_images_go_on_after_a_restart(train, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Step 4 is saved"):
        train(batches(*range(4), unreadable=2, fault="shard 3 is damaged"))
    assert train(batches(*range(8), unreadable=1), start=4) == 12
    expected = {step: 2 * min(step, 4) + max(step - 4, 0) for step in range(1, 13)}
    assert values(tmp_path, "train/unreadable") == expected


def test_a_stop_while_waiting_for_data_saves_the_last_step(train, tmp_path: Path) -> None:
    def interrupted() -> Iterator[dict]:
        yield from (batch for batch, _ in zip(batches(*range(9)), range(3), strict=False))
        raise Interrupted

    assert train(interrupted()) == 3
    assert saved(tmp_path) == [3]


def test_a_stop_in_an_evaluation_saves_and_the_evaluation_is_made_up_for(
    train, tmp_path: Path
) -> None:
    def interrupted(step: int, state: State) -> None:
        raise Interrupted

    assert train(batches(*range(12)), evaluate=interrupted) == 5
    assert saved(tmp_path) == [5] and not values(tmp_path, "eval/top1")
    assert train(batches(*range(7)), start=5) == 12
    assert list(values(tmp_path, "eval/top1")) == [5, 10, 12]
