"""The run: step, log, save, evaluate, stop. How any of these is done is somebody else's."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax

from stvit_jax.checkpoints.manager import Checkpoints
from stvit_jax.console import duration, say
from stvit_jax.errors import UserError
from stvit_jax.schedules import Schedule
from stvit_jax.training.evaluation import describe
from stvit_jax.training.metrics import MetricWriter
from stvit_jax.training.signals import Stop
from stvit_jax.training.step import Batch, TrainState


@dataclasses.dataclass(frozen=True)
class Plan:
    """What happens at which step; a step's number is the count of steps done."""

    steps: int  # the run ends here
    steps_per_epoch: int
    batch_size: int
    log_every: int
    evaluate_every: int  # steps; 0: only at the end
    checkpoint_every: int
    max_bad_fraction: float  # of images that do not decode

    def logs(self, step: int) -> bool:
        return step % self.log_every == 0 or step == self.steps

    def saves(self, step: int) -> bool:
        return step % self.checkpoint_every == 0 or step == self.steps

    def evaluates(self, step: int) -> bool:
        due = self.evaluate_every and step > 0 and step % self.evaluate_every == 0
        return bool(due) or step == self.steps


def is_done(plan: Plan, step: int, writer: MetricWriter) -> bool:
    """Whether the plan's last step has been taken, and evaluated."""
    return step > plan.steps or (step == plan.steps and writer.find(step, "eval/top1") is not None)


def train(
    state: TrainState,
    batches: Iterator[Batch],
    *,
    plan: Plan,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]],
    learning_rate: Schedule,
    evaluate: Callable[[TrainState], dict[str, float] | None],
    writer: MetricWriter,
    checkpoints: Checkpoints,
    stop: Stop,
) -> int:
    """Trains from `state` to the end of the plan, or until `stop`; saves what it leaves with.

    An evaluation that was due but never finished (the run before was stopped in it) is made up for
    at the start.

    Returns:
      The step that it ended with.

    Raises:
      UserError: the loss is not finite, checkpoints cannot be written, or the data are at fault
        (then the last step is saved first).
    """
    step = start = int(state.step)
    waiting: dict[int, dict[str, jax.Array]] = {}  # of steps that nobody has looked at
    unreadable = seen = 0
    mark = (step, time.monotonic())  # since when the speed is measured

    def look(last: int) -> None:
        """Reads the metrics up to step `last`, and reports those that are due."""
        nonlocal mark, unreadable, seen
        values = jax.device_get({s: waiting.pop(s) for s in sorted(waiting) if s <= last})
        for s, metrics in values.items():
            if not math.isfinite(metrics["loss"]):
                raise UserError(
                    f"the loss is {metrics['loss']} at step {s}; checkpoints are from before and "
                    "stay: lower config.learning_rate or try config.dtype=float32, in a new "
                    "--workdir"
                )
            unreadable, seen = unreadable + int(metrics["unreadable"]), seen + plan.batch_size
            if plan.logs(s):
                now = time.monotonic()
                speed = (s - mark[0]) * plan.batch_size / (now - mark[1])
                mark = (s, now)
                rate = float(learning_rate(s - 1))
                _report(s, float(metrics["loss"]), rate, speed, unreadable, plan, writer)

    def save() -> None:
        look(step)
        checkpoints.save(step, state)
        if checkpoints.wait() != step:
            raise UserError(
                f"step {step} could not be saved, see above; free some space, and the same command "
                "continues from the checkpoint before"
            )

    def give_up(fault: UserError) -> NoReturn:
        """Ends the run for a fault of the data, with what it has learned so far saved."""
        if step == start:
            raise fault
        save()
        raise UserError(f"{fault}. Step {step} is saved, the same command continues") from fault

    def evaluate_now() -> None:
        nonlocal mark
        try:
            metrics = evaluate(state)
        except UserError as fault:
            give_up(fault)
        if metrics is not None:
            writer.write(step, step / plan.steps_per_epoch, metrics)
            say(f"step {step}/{plan.steps}: {describe(metrics)}")
        mark = (step, time.monotonic())

    if plan.evaluates(step) and writer.find(step, "eval/top1") is None:
        evaluate_now()
    while step < plan.steps and not stop.requested:
        # A few in the first batches are no measure yet.
        if unreadable > plan.max_bad_fraction * max(seen, 1000):
            give_up(
                UserError(
                    f"{unreadable} of {seen} images do not decode, more than "
                    f"config.data.max_bad_fraction {plan.max_bad_fraction}: mend the data set, or "
                    "raise it"
                )
            )
        try:
            batch = next(batches)
        except UserError as fault:
            give_up(fault)
        state, metrics = train_step(state, batch)
        stop.arm()
        step += 1
        waiting[step] = metrics
        if plan.logs(step - 1):
            look(step - 1)  # one step late: the device is already busy with the next
        if plan.saves(step):
            look(step)
            checkpoints.save(step, state)
            mark = (step, time.monotonic())
        if plan.evaluates(step):
            look(step)
            evaluate_now()
    save()
    return step


def _report(
    step: int,
    loss: float,
    rate: float,
    speed: float,
    unreadable: int,
    plan: Plan,
    writer: MetricWriter,
) -> None:
    epoch = step / plan.steps_per_epoch
    metrics = {
        "train/loss": loss,
        "train/learning_rate": rate,
        "train/images_per_second": speed,
    }
    writer.write(step, epoch, metrics | ({"train/unreadable": unreadable} if unreadable else {}))
    left = (plan.steps - step) * plan.batch_size / speed
    say(
        f"step {step}/{plan.steps}  epoch {epoch:.2f}  loss {loss:.4f}  lr {rate:.2e}  "
        f"{speed:.0f} images/s  {duration(left)} left"
        + (f"  {unreadable} images did not decode" if unreadable else "")
    )
