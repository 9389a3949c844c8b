"""What a run knows about itself: loss, speed, unreadable examples; read late, reported when due."""

import dataclasses
import math
import time
from typing import Any

import jax

from stvit_jax.console import duration, say
from stvit_jax.errors import UserError
from stvit_jax.schedules import Schedule
from stvit_jax.training.metrics import MetricWriter


@dataclasses.dataclass(frozen=True)
class Plan:
    """What happens at which step; a step's number is the count of steps done."""

    steps: int  # the run ends here
    steps_per_epoch: int
    batch_size: int
    log_every: int
    evaluate_every: int  # steps; 0: only at the end
    checkpoint_every: int
    max_bad_fraction: float  # of examples that do not decode

    def logs(self, step: int) -> bool:
        return step % self.log_every == 0 or step == self.steps

    def saves(self, step: int) -> bool:
        return step % self.checkpoint_every == 0 or step == self.steps

    def evaluates(self, step: int) -> bool:
        due = self.evaluate_every and step > 0 and step % self.evaluate_every == 0
        return bool(due) or step == self.steps

    def epoch(self, step: int) -> float:
        return step / self.steps_per_epoch


class NonFinite(UserError):
    """The loss of a step is not finite."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(what)
        self.step, self.what = step, what


class NothingLearned(Exception):
    """The first step whose batch was a process's stand-in for data that failed."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


_OWN = ("loss", "gradient_norm", "unreadable")  # of the step; the rest are the objective's


class Meter:
    """The metrics of steps, which wait on the device until somebody looks."""

    def __init__(
        self,
        plan: Plan,
        learning_rate: Schedule,
        writer: MetricWriter | None,
        notes: dict[str, Any],
    ) -> None:
        """Without a `writer` nothing is written: another process does.

        `notes` are those of the checkpoint that the run goes on from: counts go on, too.
        """
        self._plan, self._learning_rate, self._writer = plan, learning_rate, writer
        self._waiting: dict[int, dict[str, jax.Array]] = {}
        self._unreadable = int(notes.get("unreadable", 0))
        self._skips = int(notes.get("skips", 0))  # of losses that are not finite
        self._looked_at = 0  # examples, since the program started
        self._unreadable_before = self._unreadable
        self.restart_clock(0)

    def notes(self, step: int) -> dict[str, Any]:
        """What a checkpoint of a step has to keep; the lines up to it are to be there before it."""
        if self._writer:
            self._writer.flush()
        return {
            "unreadable": self._unreadable,
            "epoch": round(self._plan.epoch(step), 4),
            "skips": self._skips,
        }

    def restart_clock(self, step: int) -> None:
        """The time up to here is not the speed of training."""
        self._mark = (step, time.monotonic())

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Of a step that may still be running."""
        self._waiting[step] = metrics

    def report_up_to(self, last: int) -> None:
        """Reads the metrics up to step `last`, and reports those that are due.

        Raises:
          NonFinite: a loss is not.
          NothingLearned: from a step on, because the data of some process had failed.
        """
        due = sorted(step for step in self._waiting if step <= last)
        for step, metrics in jax.device_get([(s, self._waiting.pop(s)) for s in due]):
            if metrics.pop("fault", False):
                self._waiting.clear()
                raise NothingLearned(step)
            if not math.isfinite(metrics["loss"]):
                raise NonFinite(step, self._not_finite(step, metrics))
            self._unreadable += int(metrics["unreadable"])
            self._looked_at += self._plan.batch_size
            if self._plan.logs(step):
                self._report(step, metrics)

    def check_unreadable(self) -> None:
        """Raises UserError where more examples do not decode than the plan permits."""
        count = self._unreadable - self._unreadable_before
        # A few in the first batches are no measure yet.
        if count > self._plan.max_bad_fraction * max(self._looked_at, 1000):
            raise UserError(
                f"{count} of {self._looked_at} images do not decode, more than "
                f"config.data.max_bad_fraction {self._plan.max_bad_fraction}: mend the data set, "
                "or raise it"
            )

    def _report(self, step: int, metrics: dict[str, Any]) -> None:
        now = time.monotonic()
        speed = (step - self._mark[0]) * self._plan.batch_size / (now - self._mark[1])
        self._mark = (step, now)
        loss, rate = float(metrics["loss"]), float(self._learning_rate(step - 1))
        parts = {k: float(v) for k, v in metrics.items() if k not in _OWN}
        line = {
            "train/loss": loss,
            "train/learning_rate": rate,
            "train/images_per_second": speed,
            **{f"train/{name}": value for name, value in parts.items()},
        }
        if self._unreadable:
            line["train/unreadable"] = self._unreadable
        if self._writer:
            self._writer.write(step, self._plan.epoch(step), line)
        left = (self._plan.steps - step) * self._plan.batch_size / speed
        unreadable = f"  {self._unreadable} images did not decode" if self._unreadable else ""
        say(
            f"step {step}/{self._plan.steps}  epoch {self._plan.epoch(step):.2f}  loss {loss:.4f}  "
            f"lr {rate:.2e}  {speed:.0f} images/s  {duration(left)} left{unreadable}"
        )

    def _not_finite(self, step: int, metrics: dict[str, Any]) -> str:
        rate = float(self._learning_rate(step - 1))
        return (
            f"the loss is {metrics['loss']} at step {step} (learning rate {rate:.2e}, norm of the "
            f"gradient {float(metrics['gradient_norm']):.3g})"
        )
