"""The order of work behind `train.py`: config, data, network, state, loop."""

import contextlib
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stvit_jax import config as configs
from stvit_jax import loop, optimizer, parallel, schedules, training
from stvit_jax.augment import augment_batch
from stvit_jax.checkpoints import Checkpoints
from stvit_jax.data.loader import device_prefetch, eval_batches, train_batches
from stvit_jax.data.order import Order
from stvit_jax.data.sources import open_source
from stvit_jax.errors import UserError
from stvit_jax.evaluation import describe, evaluate
from stvit_jax.metrics import MetricWriter, say
from stvit_jax.model import STViT, create_model
from stvit_jax.signals import STOPPED, Stop


def run(config: ConfigDict, workdir: Path, stop: Stop) -> int:
    """Trains, or evaluates, as the config says.

    Returns:
      The exit code: 0 done, 75 stopped early.

    Raises:
      UserError: a mistake in the config, the data or the workdir.
    """
    configs.validate(config)
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    mesh = parallel.make_mesh(config.batch_size)
    train_source, eval_source = (
        open_source(config.data.source, config.data.name, config.data.dir, train=train)
        for train in (True, False)
    )
    order = Order(
        len(train_source), config.batch_size, config.group_size, config.data.repeats, config.seed
    )
    plan = _plan(config, order.steps_per_epoch)
    model = _model(config, len(train_source.class_names))
    learning_rate = _learning_rate(config, order.steps_per_epoch)
    tx = optimizer.adamw(learning_rate, config.weight_decay)
    _open_workdir(config, workdir)
    say(
        f"{config.model.name} on {mesh.size} x {mesh.devices.flat[0].device_kind}; "
        f"{config.data.name}: {len(train_source)} images to train on, {len(eval_source)} to "
        f"evaluate on; workdir {workdir}"
    )

    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint_keep)
        stack.callback(checkpoints.close)
        create = partial(
            training.init_state, model, tx, image_size=config.image_size, ema=config.ema_decay > 0
        )
        state = _state(config, create, checkpoints, mesh)
        step = int(state.step)
        writer = MetricWriter(workdir, step)
        stack.callback(writer.close)
        if not config.eval_only and loop.is_done(plan, step, writer):
            say(f"nothing left to do: {_result(step, plan, writer, workdir)}")
            return 0

        loading = dict(
            image_size=config.image_size,
            slots=parallel.own_slots(config.batch_size),
            workers=config.data.workers,
        )
        put = partial(device_prefetch, sharding=parallel.by_image(mesh))
        if not config.eval_only:
            # From here on images are loaded, while the programs are being compiled.
            batches = put(
                train_batches(train_source, order, flip=config.data.flip, start=step, **loading)
            )
            stack.callback(batches.close)
        compile_step = partial(_compile, config=config, mesh=mesh)
        eval_step = compile_step(training.make_eval_step(model), state.variables)

        def evaluate_now(state: training.TrainState) -> dict[str, float] | None:
            variables = {"eval": state.variables} | ({"eval_ema": state.ema} if state.ema else {})
            loader = put(eval_batches(eval_source, batch_size=config.batch_size, **loading))
            with contextlib.closing(loader):
                return evaluate(eval_step, variables, loader, len(eval_source), stop)

        if config.eval_only:
            writer.write(step, step / plan.steps_per_epoch, evaluate_now(state))
            say(f"evaluated: {_result(step, plan, writer, workdir)}")
            return 0
        train_step = training.make_train_step(
            model,
            tx,
            seed=config.seed,
            augment=_augmentation(config, model.num_classes, mesh),
            drop_path=schedules.drop_path(
                config.model.drop_path_rate,
                config.drop_path_schedule,
                config.epochs,
                order.steps_per_epoch,
            ),
            ema_decay=config.ema_decay,
            freeze_batch_norm=config.freeze_batch_norm,
        )
        step = loop.train(
            state,
            batches,
            plan=plan,
            train_step=compile_step(train_step, state, training_step=True),
            learning_rate=learning_rate,
            evaluate=evaluate_now,
            writer=writer,
            checkpoints=checkpoints,
            stop=stop,
        )
        if not loop.is_done(plan, step, writer):
            say(f"stopped at step {step} of {plan.steps}, saved; the same command continues")
            return STOPPED
        say(f"done: {_result(step, plan, writer, workdir)}")
        return 0


def _plan(config: ConfigDict, steps_per_epoch: int) -> loop.Plan:
    return loop.Plan(
        steps=min(config.epochs * steps_per_epoch, config.steps or sys.maxsize),
        steps_per_epoch=steps_per_epoch,
        batch_size=config.batch_size,
        log_every=config.log_every,
        evaluate_every=config.eval_every_epochs * steps_per_epoch,
        checkpoint_every=config.checkpoint_every,
    )


def _model(config: ConfigDict, classes: int) -> STViT:
    settings = configs.model_settings(config)
    if settings.setdefault("num_classes", classes) != classes:
        raise UserError(
            f"config.model.num_classes is {config.model.num_classes}, but {config.data.name} has "
            f"{classes} classes: leave it out, or set {classes}"
        )
    return create_model(
        config.model.name,
        dtype=jnp.dtype(config.dtype),
        group_size=config.group_size,
        **settings,
    )


def _learning_rate(config: ConfigDict, steps_per_epoch: int) -> schedules.Schedule:
    return schedules.learning_rate(
        config.learning_rate * config.batch_size / 512,
        config.min_learning_rate,
        config.warmup_learning_rate,
        config.warmup_epochs,
        config.epochs,
        steps_per_epoch,
    )


def _augmentation(config: ConfigDict, num_classes: int, mesh: Mesh) -> training.Augment:
    return partial(
        augment_batch,
        num_classes=num_classes,
        group_size=config.group_size,
        label_smoothing=config.label_smoothing,
        mesh=mesh if mesh.size > 1 else None,
        **config.augment,
    )


def _open_workdir(config: ConfigDict, workdir: Path) -> None:
    """Creates the workdir, or checks that the run in it has this recipe; notes the config."""
    recipe = workdir / "config.json"
    if config.eval_only:
        if not workdir.is_dir():
            raise UserError(f"--workdir {workdir} does not exist: there is nothing to evaluate")
        return
    if recipe.exists() and any(workdir.glob("checkpoints/[0-9]*")):
        configs.check_same_recipe(config, recipe)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        configs.write(config, recipe)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error.strerror}") from error


def _state(
    config: ConfigDict,
    create: Callable[[jax.Array], training.TrainState],
    checkpoints: Checkpoints,
    mesh: Mesh,
) -> training.TrainState:
    """The newest sound checkpoint's state, or a new one."""
    key, whole = jax.random.key(config.seed), parallel.replicated(mesh)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        jax.eval_shape(create, key),
    )
    if restored := checkpoints.restore_newest(abstract):
        step, state = restored
        say(f"continuing after step {step}")
        return state
    if config.eval_only:
        raise UserError("config.eval_only: the workdir holds no checkpoint; train first")
    # Hundreds of small random draws, run once: optimising them takes LLVM longer than all the rest.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    options = quick if jax.default_backend() == "cpu" else None
    return jax.jit(create, out_shardings=whole, compiler_options=options)(key)


def _compile(
    step: Callable,
    state: Any,
    *,
    config: ConfigDict,
    mesh: Mesh,
    training_step: bool = False,
) -> Callable:
    start = time.monotonic()
    batch = training.abstract_batch(config.batch_size, config.image_size, training_step)
    compiled = training.compile_step(step, state, batch, mesh, donate=training_step)
    what = "training" if training_step else "evaluation"
    say(f"compiled the {what} step in {time.monotonic() - start:.0f} s")
    return compiled


def _result(step: int, plan: loop.Plan, writer: MetricWriter, workdir: Path) -> str:
    """The last line of a run: where it is, how good it is, where everything lies."""
    line = writer.find(step, "eval/top1")
    metrics = f", {describe(line)}" if line else ""
    return f"step {step} of {plan.steps}{metrics}; see {workdir}"
