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
from stvit_jax import parallel, schedules
from stvit_jax.augment import augment_batch
from stvit_jax.checkpoints import fit, weights
from stvit_jax.checkpoints.manager import Checkpoints
from stvit_jax.console import say
from stvit_jax.data.loader import DevicePrefetch, device_prefetch, eval_batches, train_batches
from stvit_jax.data.order import Order
from stvit_jax.data.sources import Source, open_source
from stvit_jax.errors import UserError
from stvit_jax.models.stvit import STViT, create_model
from stvit_jax.tasks import robustness
from stvit_jax.training import loop, optimizer
from stvit_jax.training import step as training
from stvit_jax.training.evaluation import describe, evaluate, read_variables
from stvit_jax.training.metrics import MetricWriter
from stvit_jax.training.signals import STOPPED, Stop
from stvit_jax.training.workdir import make_workdir


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
    if config.robustness:
        return robustness.run(config, workdir, stop)
    mesh = parallel.make_mesh(config.batch_size)
    open_split = partial(open_source, config.data.source, config.data.name, config.data.dir)
    eval_source = open_split(train=False)
    model = _model(config, eval_source)
    if config.eval_only:  # sets that only test (imagenet_v2) have no other split
        return _evaluate(config, workdir, model, eval_source, mesh, stop)
    return _train(config, workdir, model, open_split(train=True), eval_source, mesh, stop)


def _train(
    config: ConfigDict,
    workdir: Path,
    model: STViT,
    train_source: Source,
    eval_source: Source,
    mesh: Mesh,
    stop: Stop,
) -> int:
    order = Order(
        len(train_source), config.batch_size, config.group_size, config.data.repeats, config.seed
    )
    plan = _plan(config, order.steps_per_epoch)
    learning_rate = _learning_rate(config, order.steps_per_epoch)
    tx = optimizer.adamw(learning_rate, config.weight_decay)
    _open_workdir(config, workdir)
    say(
        f"{config.model.name} on {mesh.size} x {mesh.devices.flat[0].device_kind}; "
        f"{train_source.name}: {len(train_source)} images to train on, {len(eval_source)} to "
        f"evaluate on; workdir {workdir}"
    )
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint_keep)
        stack.callback(checkpoints.close)
        create = partial(
            training.init_state, model, tx, image_size=config.image_size, ema=config.ema_decay > 0
        )
        state = _state(config, model, create, checkpoints, mesh)
        step = int(state.step)
        writer = MetricWriter(workdir, step)
        stack.callback(writer.close)
        if loop.is_done(plan, step, writer):
            say(f"nothing left to do: {_result(step, plan, writer, workdir)}")
            return 0
        # From here on images are loaded, while the programs are being compiled.
        batches = device_prefetch(
            train_batches(
                train_source, order, flip=config.data.flip, start=step, **_loading(config)
            ),
            parallel.by_image(mesh),
        )
        stack.callback(batches.close)
        eval_step = _compile(training.make_eval_step(model), state.variables, config, mesh)

        def evaluate_now(state: training.TrainState) -> dict[str, float] | None:
            variables = {"eval": state.variables} | ({"eval_ema": state.ema} if state.ema else {})
            with contextlib.closing(_eval_loader(config, eval_source, mesh)) as loader:
                return evaluate(eval_step, variables, loader, len(eval_source), stop)

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
            train_step=_compile(train_step, state, config, mesh, train=True),
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


def _evaluate(
    config: ConfigDict, workdir: Path, model: STViT, source: Source, mesh: Mesh, stop: Stop
) -> int:
    """Evaluates `init_from`, or the newest checkpoint of the workdir, raw and EMA; only reads."""
    path = Path(config.init_from or workdir)
    variables = {}
    variables["eval"], found = read_variables(model, path, config.init_from_ema, mesh)
    if not config.init_from and config.ema_decay:
        variables["eval_ema"], _ = read_variables(model, path, True, mesh)
    make_workdir(workdir)
    say(f"evaluating {found} on {len(source)} images of {source.name}")
    eval_step = _compile(training.make_eval_step(model), variables["eval"], config, mesh)
    with contextlib.closing(_eval_loader(config, source, mesh)) as loader:
        metrics = evaluate(eval_step, variables, loader, len(source), stop)
    if metrics is None:
        return STOPPED
    step = int(found.name) if found.name.isdecimal() else 0
    with contextlib.closing(MetricWriter(workdir)) as writer:
        epoch = (writer.find(step, "epoch") or {"epoch": 0.0})["epoch"]
        writer.write(step, epoch, metrics | {"eval_only": True})
    say(f"evaluated: {describe(metrics)}; see {workdir / 'metrics.jsonl'}")
    return 0


def _plan(config: ConfigDict, steps_per_epoch: int) -> loop.Plan:
    return loop.Plan(
        steps=min(config.epochs * steps_per_epoch, config.steps or sys.maxsize),
        steps_per_epoch=steps_per_epoch,
        batch_size=config.batch_size,
        log_every=config.log_every,
        evaluate_every=config.eval_every_epochs * steps_per_epoch,
        checkpoint_every=config.checkpoint_every,
        max_bad_fraction=config.data.max_bad_fraction,
    )


def _model(config: ConfigDict, source: Source) -> STViT:
    overrides = configs.model_settings(config)
    classes = source.num_classes
    if overrides.setdefault("num_classes", classes) != classes:
        raise UserError(
            f"config.model.num_classes is {config.model.num_classes}, but {source.name} has "
            f"{classes} classes: leave it out, or set {classes}"
        )
    return create_model(
        config.model.name,
        dtype=jnp.dtype(config.dtype),
        group_size=config.group_size,
        **overrides,
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


def _loading(config: ConfigDict) -> dict[str, Any]:
    return dict(
        image_size=config.image_size,
        slots=parallel.own_slots(config.batch_size),
        workers=config.data.workers,
    )


def _eval_loader(config: ConfigDict, source: Source, mesh: Mesh) -> DevicePrefetch:
    batches = eval_batches(source, batch_size=config.batch_size, **_loading(config))
    return device_prefetch(batches, parallel.by_image(mesh))


def _open_workdir(config: ConfigDict, workdir: Path) -> None:
    """Creates the workdir, or checks that the run in it has this recipe; notes the config."""
    recipe = workdir / "config.json"
    if recipe.exists() and any(workdir.glob("checkpoints/[0-9]*")):
        configs.check_same_recipe(config, recipe)
    make_workdir(workdir)
    configs.write(config, recipe)


def _state(
    config: ConfigDict,
    model: STViT,
    create: Callable[[jax.Array], training.TrainState],
    checkpoints: Checkpoints,
    mesh: Mesh,
) -> training.TrainState:
    """The newest sound checkpoint's state, or a new one, from `init_from` where that is given."""
    key, whole = jax.random.key(config.seed), parallel.replicated(mesh)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        jax.eval_shape(create, key),
    )
    if restored := checkpoints.restore_newest(abstract):
        step, state = restored
        say(f"continuing after step {step}")
        return state
    found = weights.read(config.init_from, config.init_from_ema) if config.init_from else None
    # Hundreds of small random draws, run once: optimising them takes LLVM longer than all the rest.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    options = quick if jax.default_backend() == "cpu" else None
    state = jax.jit(create, out_shardings=whole, compiler_options=options)(key)
    if found is None:
        return state
    fit.check_heads(model, found)
    variables = jax.device_put(fit.merge(state.variables, found), whole)
    say(f"starting from {found.source}")
    # A copy: two leaves of one donated state must not share a buffer.
    return state.replace(**variables, ema=jax.tree.map(jnp.copy, variables) if state.ema else {})


def _compile(
    step: Callable, state: Any, config: ConfigDict, mesh: Mesh, train: bool = False
) -> Callable:
    start = time.monotonic()
    batch = training.abstract_batch(config.batch_size, config.image_size, train)
    compiled = training.compile_step(step, state, batch, mesh, donate=train)
    what = "training" if train else "evaluation"
    say(f"compiled the {what} step in {time.monotonic() - start:.0f} s")
    return compiled


def _result(step: int, plan: loop.Plan, writer: MetricWriter, workdir: Path) -> str:
    """The last line of a run: where it is, how good it is, where everything lies."""
    line = writer.find(step, "eval/top1")
    metrics = f", {describe(line)}" if line else ""
    return f"step {step} of {plan.steps}{metrics}; see {workdir}"
