"""The order of work behind `train.py`: config, task, state, loop."""

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stvit_jax import cluster, parallel, places, schedules, tasks
from stvit_jax.checkpoints import weights
from stvit_jax.checkpoints.manager import Checkpoints
from stvit_jax.config import check_same_recipe, to_json, validate
from stvit_jax.console import say, warn
from stvit_jax.data.files import allow_many_open
from stvit_jax.data.loader import eval_batches, train_batches
from stvit_jax.data.order import Order
from stvit_jax.data.prefetch import DevicePrefetch, device_prefetch
from stvit_jax.data.share import Share, share_spec
from stvit_jax.errors import Interrupted, UserError, listing
from stvit_jax.models.settings import UNOPTIMIZED
from stvit_jax.training import loop, optimizer, workdir
from stvit_jax.training.evaluation import AVERAGED, RAW, describe, evaluate
from stvit_jax.training.gradients import accumulated
from stvit_jax.training.meter import Meter, Plan
from stvit_jax.training.metrics import MetricWriter, keep_lines
from stvit_jax.training.signals import STOPPED, Stop
from stvit_jax.training.step import (
    TrainState,
    TrainStep,
    abstract_batch,
    compile_step,
    init_state,
    make_train_step,
)
from stvit_jax.training.task import Evaluation, Metrics, Task, Variables


def run(
    config: ConfigDict, where: Path, stop: Stop, membership: cluster.Membership | None = None
) -> int:
    """Trains, or evaluates, as the config says, in the folder `where`.

    Args:
      config: as `config.base` has it.
      where: the workdir.
      stop: of this process.
      membership: its place among several, where flags give it.

    Returns:
      The exit code: 0 done, 75 stopped early.

    Raises:
      UserError: a mistake in the config, the data or the workdir.
    """
    validate(config)
    allow_many_open()  # a checkpoint of a large network and a set in shards have many files
    x64 = config.dtype == "float64"
    parallel.prepare(x64=x64, deterministic=config.deterministic, workdir=where)
    cluster.join(membership)
    if cluster.joined():
        stop.share()
    with cluster.together():
        places.reach(where)
        if config.init_from:
            places.reach(places.of(config.init_from))
        mesh = parallel.make_mesh(config.batch_size, config.gradient_accumulation)
        task = tasks.build(config, mesh)
    _check_same_data(task)
    evaluator = Evaluator(task.evaluations, config, mesh, stop)
    if config.eval_only:
        code = _evaluate(config, where, task, evaluator, mesh)
    else:
        code = _train(config, where, task, evaluator, mesh, stop)
    cluster.barrier()  # the first process may still have been writing
    return code


@dataclasses.dataclass(frozen=True)
class Plans:
    """What is decided before anything runs: which images, when what happens, how it learns."""

    order: Order
    plan: Plan
    learning_rate: schedules.Schedule
    tx: optax.GradientTransformation

    @classmethod
    def of(cls, config: ConfigDict, task: Task) -> "Plans":
        """Those of a config.

        Raises:
          UserError: the data set is smaller than a batch.
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
        tx = optimizer.adamw(learning_rate, config.weight_decay, config.gradient_clip)
        return cls(order, plan, learning_rate, tx)


def train_step_of(
    config: ConfigDict, task: Task, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainStep:
    """The training step of a config, not compiled."""
    # Images that share statistics stay in one part; frozen statistics are shared by all.
    group_size = 0 if config.freeze_batch_norm else config.group_size
    gradients = accumulated(task.objective, config.gradient_accumulation, group_size, mesh)
    return make_train_step(task.prepare, gradients, tx, config.ema_decay)


class Evaluator:
    """Evaluates a task's sets; every program is compiled once."""

    def __init__(
        self, evaluations: tuple[Evaluation, ...], config: ConfigDict, mesh: Mesh, stop: Stop
    ) -> None:
        self._evaluations, self._config, self._mesh, self._stop = evaluations, config, mesh, stop
        self._compiled: dict[Callable, Callable] = {}

    def compile(self, variables: Variables) -> None:
        """Compiles all programs, where that is to be done ahead of the first evaluation."""
        for evaluation in self._evaluations:
            if evaluation.measure not in self._compiled:
                start = time.monotonic()
                batch = abstract_batch(share_spec(evaluation.examples), self._config.batch_size)
                self._compiled[evaluation.measure] = compile_step(
                    evaluation.measure, variables, batch, mesh=self._mesh, donate=False
                )
                say(f"compiled the evaluation step in {time.monotonic() - start:.0f} s")

    def __call__(self, variables: dict[str, Variables]) -> Metrics:
        """The metrics of all sets, for each suffix of `variables`.

        Raises:
          Interrupted: it was to stop.
          UserError: as `evaluate`.
        """
        self.compile(variables[RAW])
        metrics: Metrics = {}
        for evaluation in self._evaluations:
            share = self._batches(evaluation)
            batches = _prefetched(share, self._mesh, self._stop)
            with contextlib.closing(batches):
                metrics |= evaluate(
                    evaluation,
                    self._compiled[evaluation.measure],
                    variables,
                    batches,
                    self._stop.reached,
                    share.agree,
                )
            if len(self._evaluations) > 1:
                say(describe(evaluation, metrics))
        return metrics

    def describe(self, metrics: Metrics) -> str:
        """All of it in words."""
        return "; ".join(filter(None, (describe(e, metrics) for e in self._evaluations)))

    def _batches(self, evaluation: Evaluation) -> Share:
        examples, size = evaluation.examples, self._config.batch_size
        slots = parallel.own_slots(size, self._mesh)
        batches = eval_batches(
            examples, batch_size=size, slots=slots, workers=self._config.data.workers
        )
        return Share(batches, examples, len(slots), -(-len(examples.source) // size))


def _train(
    config: ConfigDict, where: Path, task: Task, evaluator: Evaluator, mesh: Mesh, stop: Stop
) -> int:
    plans = Plans.of(config, task)
    plan = plans.plan
    with cluster.together():
        if cluster.is_first():
            _open_workdir(config, where, task)
    workdir.check_shared(where)
    say(
        f"{task.what} on {mesh.size} x {mesh.devices.flat[0].device_kind}; "
        f"{task.train.source.name}: {len(task.train.source)} images to train on, "
        f"{sum(len(e.examples.source) for e in task.evaluations)} to evaluate on; workdir {where}"
    )
    spanning = parallel.spanning_groups(
        config.batch_size, config.group_size, mesh.size, config.gradient_accumulation
    )
    if spanning and not config.freeze_batch_norm:
        warn(spanning, everyone=False)
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(where / "checkpoints", keep=config.checkpoint_keep)
        stack.push(partial(_close, checkpoints))
        create = partial(init_state, task.init, plans.tx, ema=config.ema_decay > 0)
        state, notes = _state(config, task, create, checkpoints, mesh)
        step = int(state.step)
        done = workdir.Evaluations(where)
        done.forget_after(step)
        evaluated = bool(cluster.told("yes" if done.of(step) is not None else ""))
        if step > plan.steps or (step == plan.steps and evaluated):
            say(f"nothing left to do: {_result(step, plan, done, evaluator, where)}")
            return 0
        writer = None
        if cluster.is_first():
            keep_lines(where, step, evaluated or not plan.evaluates(step))
            writer = MetricWriter(where)
            stack.callback(writer.close)
        # From here on images are loaded, while the programs are being compiled.
        slots = parallel.own_slots(config.batch_size, mesh)
        loaded = train_batches(
            task.train, plans.order, start=step, slots=slots, workers=config.data.workers
        )
        share = Share(loaded, task.train, len(slots))
        batches = _prefetched(share, mesh, stop)
        stack.callback(batches.close)
        evaluator.compile(state.variables)

        def evaluate_now(step: int, state: TrainState) -> None:
            averaged = {AVERAGED: state.ema} if state.ema else {}
            metrics = evaluator({RAW: state.variables} | averaged)
            if writer:
                writer.write(step, plan.epoch(step), metrics)
            done.add(step, metrics)
            say(f"step {step}/{plan.steps}: {evaluator.describe(metrics)}")

        key = jax.jit(
            partial(jax.random.key, config.seed), out_shardings=parallel.replicated(mesh)
        )()
        train_step = train_step_of(config, task, plans.tx, mesh)
        compiled = _compile_train_step(train_step, state, task, key, config, mesh)
        cluster.barrier()  # one may have compiled for minutes longer, and collectives do not wait
        step = loop.train(
            state,
            batches,
            plan=plan,
            train_step=compiled,
            key=key,
            evaluate=evaluate_now,
            evaluated=evaluated,
            meter=Meter(plan, plans.learning_rate, writer, notes),
            checkpoints=checkpoints,
            stop=stop,
            agree=share.agree,
        )
    if step < plan.steps or done.of(step) is None:
        say(f"stopped at step {step} of {plan.steps}, saved; the same command continues")
        return STOPPED
    say(f"done: {_result(step, plan, done, evaluator, where)}")
    return 0


def _evaluate(config: ConfigDict, where: Path, task: Task, evaluator: Evaluator, mesh: Mesh) -> int:
    """Evaluates `init_from`, or the newest checkpoint of the workdir, raw and EMA; only reads."""
    if not config.init_from and not workdir.has_checkpoints(where):
        raise UserError(
            f"there is no checkpoint in {where} to evaluate: name weights with "
            "--config.init_from=PATH, or the workdir of a run"
        )
    path = config.init_from or where
    abstract = jax.eval_shape(task.init, jax.random.key(0))

    def adopted(ema: bool) -> tuple[Variables, weights.Weights]:
        found = weights.read(path, ema)
        variables = task.adopt(abstract, found, True)
        return jax.device_put(variables, parallel.replicated(mesh)), found

    variables = {}
    with cluster.together():
        variables[RAW], found = adopted(config.init_from_ema)
        if not config.init_from and config.ema_decay:
            variables[AVERAGED], _ = adopted(True)
    images = sum(len(e.examples.source) for e in task.evaluations)
    names = ", ".join(e.examples.source.name for e in task.evaluations)
    try:
        workdir.make(where)
    except UserError as error:  # one that may only be read can be evaluated all the same
        warn(f"{error}; the result will be on the console only")
        where = None
    say(f"evaluating {found.source} on {images} images of {names}")
    try:
        metrics = evaluator(variables)
    except Interrupted:
        return STOPPED
    said = f"evaluated: {evaluator.describe(metrics)}"
    if where is None:
        say(said)
        return 0
    say(f"{said}; see {where / 'metrics.jsonl'}")
    if not cluster.is_first():
        return 0
    with contextlib.closing(MetricWriter(where)) as writer:
        writer.write(found.step or 0, found.epoch or 0.0, metrics, eval_only=True)
    return 0


def _close(checkpoints: Checkpoints, kind: type[BaseException] | None, *_: Any) -> None:
    """Waits for a save in flight; not after what the other processes know nothing of."""
    if kind is None or issubclass(kind, UserError) or not cluster.joined():
        checkpoints.close()


def _check_same_data(task: Task) -> None:
    """Sees that the processes have opened the same sets, each from where it has them."""
    sets = [task.train, *(e.examples for e in task.evaluations)]
    sizes = ", ".join(f"{len(s.source)} of {s.source.name}" for s in sets if s)
    names = hashlib.sha256(json.dumps(task.classes).encode()).hexdigest()
    own = f"{sizes}; classes {names[:12]}"
    first = cluster.told(own)
    with cluster.together():
        if own != first:
            raise UserError(
                f"the data here are others than those of process 0 ({own}; there {first}): give "
                "every host the same"
            )


def _prefetched(batches: Share, mesh: Mesh, stop: Stop) -> DevicePrefetch:
    return device_prefetch(batches, parallel.by_image(mesh), interrupted=lambda: stop.requested)


def _open_workdir(config: ConfigDict, where: Path, task: Task) -> None:
    """Creates the workdir, or checks that the run in it has this recipe and these classes."""
    if workdir.has_checkpoints(where):
        recipe = where / workdir.CONFIG
        before = workdir.read_text(recipe)
        if before is None:
            raise UserError(
                f"{where} holds checkpoints, and no {recipe.name} to tell their recipe: bring it "
                "back, or start another --workdir with --config.init_from of this one"
            )
        check_same_recipe(config, before, str(recipe))
        _check_same_classes(task.classes, workdir.read_text(where / workdir.CLASSES), where)
    workdir.make(where)
    workdir.replace(where / workdir.CONFIG, to_json(config))
    if task.classes:
        workdir.replace(where / workdir.CLASSES, json.dumps(task.classes, indent=1) + "\n")


def _check_same_classes(classes: tuple[str, ...], before: str | None, where: Path) -> None:
    if before is None:
        return  # a run of before this was kept
    then = json.loads(before)
    if list(classes) == then:
        return
    gone, new = sorted(set(then) - set(classes)), sorted(set(classes) - set(then))
    raise UserError(
        f"the data have {len(classes)} classes, and not the {len(then)} that the run in {where} "
        f"has learned: missing: {listing(gone, 3)}; new: {listing(new, 3)}; bring the classes "
        "back, or start another --workdir with --config.init_from of this one"
    )


def _state(
    config: ConfigDict,
    task: Task,
    create: Callable[..., TrainState],
    checkpoints: Checkpoints,
    mesh: Mesh,
) -> tuple[TrainState, dict[str, Any]]:
    """The newest sound checkpoint's state, or a new one, from `init_from` where that is given.

    Returns:
      The state, and the notes that were kept with it.
    """
    key, whole = jax.random.key(config.seed), parallel.replicated(mesh)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        jax.eval_shape(lambda key: create(key=key), key),
    )
    if restored := checkpoints.restore_newest(abstract):
        step, state, notes = restored
        say(f"continuing after step {step}")
        return state, notes
    with cluster.together():
        found = weights.read(config.init_from, config.init_from_ema) if config.init_from else None
    options = UNOPTIMIZED if jax.default_backend() == "cpu" else None
    state = jax.jit(lambda key: create(key=key), out_shardings=whole, compiler_options=options)(key)
    if found is None:
        return state, {}
    variables = jax.device_put(task.adopt(state.variables, found, False), whole)
    say(f"starting from {found.source}")
    # A copy: two leaves of one donated state must not share a buffer.
    ema = jax.tree.map(jnp.copy, variables) if state.ema else {}
    return state.replace(**variables, ema=ema), {}


def _compile_train_step(
    train_step: Callable,
    state: TrainState,
    task: Task,
    key: jax.Array,
    config: ConfigDict,
    mesh: Mesh,
) -> Callable:
    start = time.monotonic()
    batch = abstract_batch(share_spec(task.train), config.batch_size)
    compiled = compile_step(train_step, state, batch, key, mesh=mesh, donate=True)
    say(f"compiled the training step in {time.monotonic() - start:.0f} s")
    return compiled


def _result(
    step: int, plan: Plan, done: workdir.Evaluations, evaluator: Evaluator, where: Path
) -> str:
    """The last line of a run: where it is, how good it is, where everything lies."""
    found = done.of(step)
    metrics = f", {evaluator.describe(found)}" if found else ""
    return f"step {step} of {plan.steps}{metrics}; see {where}"
