"""What is decided before anything runs: which images, when what happens, how it learns."""

import dataclasses
import sys
from collections.abc import Callable

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
        steps_per_epoch = order.steps_per_epoch
        plan = Plan(
            steps=min(config.epochs * steps_per_epoch, config.steps or sys.maxsize),
            steps_per_epoch=steps_per_epoch,
            batch_size=batch_size,
            log_every=config.log_every,
            evaluate_every=config.eval_every_epochs * steps_per_epoch,
            checkpoint_every=config.checkpoint_every,
            max_bad_fraction=config.data.max_bad_fraction,
        )
        learning_rate = schedules.learning_rate(
            config.learning_rate * batch_size / 512,
            config.min_learning_rate,
            config.warmup_learning_rate,
            config.warmup_epochs,
            config.epochs,
            steps_per_epoch,
        )
        tx = optimizer.adamw(
            learning_rate, config.weight_decay, config.gradient_clip, task.multipliers
        )
        return cls(order, plan, learning_rate, tx)


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
