"""The run: step, log, save, evaluate, stop. How any of these is done is somebody else's."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from stvit_jax import cluster
from stvit_jax.checkpoints.manager import Checkpoints
from stvit_jax.errors import Interrupted, UserError
from stvit_jax.training.meter import Meter, NothingLearned, Plan
from stvit_jax.training.signals import Stop
from stvit_jax.training.step import TrainState, TrainStep
from stvit_jax.training.task import Batch
from stvit_jax.training.watchdog import Watchdog


def train(
    state: TrainState,
    batches: Iterator[Batch],
    *,
    waits_for: Callable[[], str],
    plan: Plan,
    train_step: TrainStep,
    key: jax.Array,
    evaluate: Callable[[int, TrainState], None],
    evaluated: bool,
    meter: Meter,
    checkpoints: Checkpoints,
    stop: Stop,
    agree: Callable[[], None],
    watchdog: Watchdog,
) -> int:
    """Trains from `state` to the end of the plan, or until `stop`; saves what it leaves with.

    Args:
      state: donated to the first step.
      batches: from batch number `state.step` on; raises Interrupted where it waits in vain.
      waits_for: what the next of them comes from, in words.
      plan: what happens at which step.
      train_step: compiled.
      key: of the run's randomness.
      evaluate: (step, state): evaluates and reports; raises Interrupted where it is stopped.
      evaluated: whether the first state has been, where that is due; it is made up for, if not.
      meter: takes the metrics.
      checkpoints: takes the states.
      stop: ends the run after a step.
      agree: raises, in all processes, the fault of the data that one of them has met.
      watchdog: is told what the run turns to.

    Returns:
      The step that it ended with.

    Raises:
      UserError: the loss is not finite, checkpoints cannot be written, or the data are at fault
        (then the last step is saved first).
    """
    step = start = int(state.step)
    meter.restart_clock(step)
    latest: dict[str, jax.Array] = {}
    devices = "the devices, or the other processes" if cluster.joined() else "the devices"

    def save_last() -> None:
        watchdog.at(f"the storage: the checkpoint of step {step}")
        meter.report_up_to(step)
        checkpoints.save_and_wait(step, state, meter.notes(step))

    def of_data(act: Callable, *args: Any) -> Any:
        """A fault of the data ends the run with what it has learned so far saved."""
        try:
            return act(*args)
        except UserError as fault:
            if step == start:
                raise
            save_last()
            raise UserError(f"{fault}. Step {step} is saved, the same command continues") from fault

    try:
        if plan.evaluates(step) and not evaluated:
            of_data(evaluate, step, state)
            meter.restart_clock(step)
        while step < plan.steps and not stop.reached():
            of_data(meter.check_unreadable)
            watchdog.at(waits_for)
            batch = of_data(next, batches)
            watchdog.at(devices)
            state, metrics = train_step(state, batch, key)
            stop.arm()
            # The host is one step ahead, not many: each that a device ends is a sign of life.
            before, latest = latest, metrics
            jax.block_until_ready(before)
            step += 1
            meter.add(step, metrics)
            if plan.logs(step - 1):
                meter.report_up_to(step - 1)  # one step late: the device is busy with the next
            if plan.saves(step):
                meter.report_up_to(step)
                watchdog.at(f"the storage: the checkpoint of step {step}, or the one before")
                checkpoints.save(step, state, meter.notes(step))
                meter.restart_clock(step)
            if plan.evaluates(step):
                meter.report_up_to(step)
                of_data(evaluate, step, state)
                meter.restart_clock(step)
        meter.report_up_to(step)
    except Interrupted:
        pass  # by `stop`, while waiting
    except NothingLearned as found:  # and nothing after it
        step = found.step - 1
        of_data(agree)
    save_last()
    return step
