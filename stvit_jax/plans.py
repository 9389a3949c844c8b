"""What is decided before anything runs: which images, when what happens, how it learns."""

import dataclasses
import sys
from collections.abc import Callable
from typing import NamedTuple

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stvit_jax import schedules
from stvit_jax.data.order import Order
from stvit_jax.training import optimizer
from stvit_jax.training.gradients import accumulated
from stvit_jax.training.meter import Plan
from stvit_jax.training.step import TrainStep, make_train_step
from stvit_jax.training.task import Batch, Task


@dataclasses.dataclass(frozen=True)
class Plans:
    """The order of the images, the plan of the steps, the learning rate and the optimiser."""

    order: Order
    plan: Plan
    learning_rate: schedules.Schedule
    tx: optax.GradientTransformation

    @classmethod
    def of(cls, config: ConfigDict, task: Task) -> "Plans":
        """Those of a config.

        Raises:
          UserError: there is nothing to train on.
        """
        images, batch_size = len(task.train.source), config.batch_size
        order = Order(images, batch_size, config.group_size, config.data.repeats, config.seed)
        course = COURSES[config.schedule](config, order.steps_per_epoch)
        plan = Plan(
            steps=min(course.steps, config.steps or sys.maxsize),
            steps_per_epoch=order.steps_per_epoch,
            batch_size=batch_size,
            log_every=config.log_every,
            evaluate_every=course.evaluate_every,
            checkpoint_every=config.checkpoint_every,
            max_bad_fraction=config.data.max_bad_fraction,
        )
        tx = optimizer.adamw(
            course.learning_rate,
            config.weight_decay,
            config.gradient_clip,
            task.multipliers,
            optimizer.DECAYED[config.decay],
        )
        return cls(order, plan, course.learning_rate, tx)


class Course(NamedTuple):
    """How long a run is, in steps, and what changes on the way."""

    steps: int
    learning_rate: schedules.Schedule
    evaluate_every: int


def by_epochs(config: ConfigDict, steps_per_epoch: int) -> Course:
    """Classification's, as published: everything changes, or happens, between epochs."""
    learning_rate = schedules.learning_rate(
        config.learning_rate * config.batch_size / 512,
        config.min_learning_rate,
        config.warmup_learning_rate,
        config.warmup_epochs,
        config.epochs,
        steps_per_epoch,
    )
    steps = config.epochs * steps_per_epoch
    return Course(steps, learning_rate, config.eval_every_epochs * steps_per_epoch)


def by_steps(config: ConfigDict, steps_per_epoch: int) -> Course:
    """Segmentation's: a number of steps, whatever the set's size."""
    learning_rate = schedules.polynomial(
        config.learning_rate * config.batch_size / 512,
        config.min_learning_rate,
        config.poly_power,
        config.total_steps,
        config.warmup_steps,
    )
    return Course(config.total_steps, learning_rate, config.eval_every_steps)


COURSES = {"cosine": by_epochs, "poly": by_steps}  # by config.schedule


def train_step_of(
    config: ConfigDict,
    task: Task,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    prepare: Callable[..., Batch] | None = None,
) -> TrainStep:
    """The training step of a config, not compiled; `prepare` is in place of the task's."""
    # Images that share statistics stay in one part; frozen statistics are shared by all.
    group_size = 0 if config.freeze_batch_norm else config.group_size
    gradients = accumulated(task.objective, config.gradient_accumulation, group_size, mesh)
    return make_train_step(prepare or task.prepare, gradients, tx, config.ema_decay)
