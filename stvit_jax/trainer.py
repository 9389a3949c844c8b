"""One run of training in one workdir: what it goes on from, what it leaves."""

import contextlib
import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stvit_jax import cluster, parallel, programs
from stvit_jax.checkpoints.manager import Checkpoints
from stvit_jax.config import check_same_recipe, flat, to_json
from stvit_jax.console import say, warn
from stvit_jax.data.examples import batch_spec
from stvit_jax.data.loader import train_batches
from stvit_jax.data.order import Order
from stvit_jax.data.prefetch import DevicePrefetch, device_prefetch
from stvit_jax.data.share import Share, share_spec
from stvit_jax.errors import UserError, listing
from stvit_jax.evaluator import Evaluator, read_alike
from stvit_jax.models.settings import UNOPTIMIZED
from stvit_jax.plans import Plans, train_step_of
from stvit_jax.training import loop, workdir
from stvit_jax.training.evaluation import AVERAGED, RAW
from stvit_jax.training.loggers import Logger
from stvit_jax.training.meter import Meter, NonFinite
from stvit_jax.training.metrics import MetricWriter, keep_lines
from stvit_jax.training.owner import Owner
from stvit_jax.training.signals import STOPPED, Stop
from stvit_jax.training.step import TrainState, abstract_batch, at_step, compile_step, init_state
from stvit_jax.training.task import Task, step_keys
from stvit_jax.training.watchdog import Watchdog
from stvit_jax.trees import digest

SHOWN = 16  # inputs, to TensorBoard
MOST_SKIPS = 3  # of losses that are not finite, in a run


class Trainer:
    """Trains as a config says, in the folder `where`."""

    def __init__(
        self,
        config: ConfigDict,
        where: Path,
        task: Task,
        evaluator: Evaluator,
        mesh: Mesh,
        stop: Stop,
        watchdog: Watchdog,
    ) -> None:
        """Raises UserError where there is nothing to train on."""
        self._config, self._where, self._task, self._mesh = config, where, task, mesh
        self._evaluator, self._stop, self._watchdog = evaluator, stop, watchdog
        self._plans = Plans.of(config, task)
        self._plan = self._plans.plan
        self._writer: MetricWriter | None = None  # in the first process

    def run(self) -> int:
        """Goes on from the newest checkpoint, or begins.

        Returns:
          The exit code: 0 done, 75 stopped early.

        Raises:
          UserError: whatever ends it; what it has learned is saved, or the message says why not.
        """
        with contextlib.ExitStack() as stack:
            self._open_workdir(stack)
            self._checkpoints = Checkpoints(
                self._where / "checkpoints", keep=self._config.checkpoint_keep
            )
            stack.push(self._close_checkpoints)
            state, notes = self._newest()
            step = int(state.step)
            self._given = self._read_given(step)
            self._done = workdir.Evaluations(self._where)
            self._done.forget_after(step)
            self._spare_best()
            evaluated = bool(cluster.told("yes" if self._done.of(step) is not None else ""))
            if step > self._plan.steps or (step == self._plan.steps and evaluated):
                say(f"nothing left to do: {self._result(step)}")
                return 0
            if cluster.is_first():
                keep_lines(self._where, step, evaluated or not self._plan.evaluates(step))
                self._writer = MetricWriter(self._where, self._logger())
                stack.callback(lambda: self._writer.close())
                if step == 0:
                    self._writer.describe(flat(self._config), self._pictures)
            step = self._train(stack, state, notes, evaluated)
        if self._watchdog.stalled and not self._stop.requested:
            raise UserError(
                f"nothing happened, see above. Step {step} is saved, the same command continues"
            )
        if step < self._plan.steps or self._done.of(step) is None:
            say(f"stopped at step {step} of {self._plan.steps}, saved; the same command continues")
            return STOPPED
        self._report(step)
        say(f"done: {self._result(step)}")
        return 0

    def _train(
        self, stack: contextlib.ExitStack, state: TrainState, notes: dict, evaluated: bool
    ) -> int:
        """To the end of the plan, past losses that are not finite if they may be passed."""
        # From here on images are loaded, while the programs are being compiled.
        share, batches = self._load(stack, int(state.step))
        self._evaluator.compile(state.variables)
        draw_key = partial(jax.random.key, self._config.seed)
        key = jax.jit(draw_key, out_shardings=parallel.replicated(self._mesh))()
        train_step = self._compile(state, key)
        cluster.barrier()  # one may have compiled for minutes longer, and collectives do not wait
        self._watchdog.start()
        while True:
            try:
                meter = Meter(self._plan, self._plans.learning_rate, self._writer, notes)
                return loop.train(
                    state,
                    batches,
                    waits_for=share.waits_for,
                    plan=self._plan,
                    train_step=train_step,
                    key=key,
                    evaluate=partial(self._evaluate, meter),
                    evaluated=evaluated,
                    meter=meter,
                    checkpoints=self._checkpoints,
                    stop=self._stop,
                    agree=share.agree,
                    watchdog=self._watchdog,
                )
            except NonFinite as error:
                found = error.with_traceback(None)  # whose frames hold a state that is of no use
            batches.close()
            state, notes = self._go_back(found, notes)
            evaluated = False
            share, batches = self._load(stack, found.step)

    def _logger(self) -> Logger | None:
        config = self._config
        if not config.logger:
            return None
        return Logger(config.logger, config.logger_project, flat(config), self._where)

    def _pictures(self) -> np.ndarray:
        """The first inputs of another epoch like the first, uint8 (N, S, S, 3), as trained on."""
        config, source = self._config, self._task.train.source
        count = config.group_size or min(SHOWN, len(source))
        order = Order(len(source), count, count, config.data.repeats, seed=config.seed)
        with contextlib.closing(train_batches(self._task.train, order)) as batches:
            batch = next(batches)
        rows = self._task.sheet(batch, step_keys(jax.random.key(config.seed), 0)[0])
        return np.stack([pictures[-1][0] for pictures in rows[:SHOWN]])

    def _load(self, stack: contextlib.ExitStack, start: int) -> tuple[Share, DevicePrefetch]:
        config, examples = self._config, self._task.train
        slots = parallel.own_slots(config.batch_size, self._mesh)
        loaded = train_batches(
            examples, self._plans.order, start=start, slots=slots, workers=config.data.workers
        )
        share = Share(loaded, itertools.repeat(batch_spec(examples)), len(slots))
        batches = device_prefetch(
            share,
            parallel.by_image(self._mesh),
            interrupted=lambda: self._stop.requested or self._watchdog.stalled,
        )
        stack.callback(batches.close)
        return share, batches

    def _evaluate(self, meter: Meter, step: int, state: TrainState) -> None:
        averaged = {AVERAGED: state.ema} if state.ema else {}
        metrics = self._evaluator({RAW: state.variables} | averaged)
        if self._writer:
            self._writer.write(step, self._plan.epoch(step), metrics)
        self._done.add(step, metrics)
        say(f"step {step}/{self._plan.steps}: {self._evaluator.describe(metrics)}")
        if self._spare_best() == step:
            self._checkpoints.save(step, state, meter.notes(step))

    def _spare_best(self) -> int | None:
        """Keeps the checkpoint of the best evaluation, where that is wanted; its step."""
        if not self._config.checkpoint_best:
            return None
        scores = {step: self._evaluator.best(self._done.of(step)) for step in self._done.steps()}
        if not any(scores.values()):
            return None
        best = max((s for s in scores if scores[s]), key=lambda step: scores[step][0])
        self._checkpoints.spare(best)
        score, suffix = scores[best]
        if cluster.is_first():
            record = {"step": best, "score": score, "ema": bool(suffix)}
            try:
                workdir.replace(self._where / workdir.BEST, json.dumps(record) + "\n")
            except UserError as error:
                warn(str(error))
        return best

    def _report(self, step: int) -> None:
        """What is left for those who look at a run that is over."""
        if cluster.is_first():
            self._evaluator.report(self._done.of(step), self._where)
        if (best := self._spare_best()) is not None:
            score, suffix = self._evaluator.best(self._done.of(best))
            say(
                f"best: {score:.4f} at step {best}{', of the moving average' if suffix else ''}; "
                f"its weights are {self._where / 'checkpoints' / str(best)}"
            )

    def _go_back(self, found: NonFinite, notes: dict) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint's state, moved past the batches up to the loss that is not finite.

        Raises:
          UserError: that is not wanted, or has happened too often.
        """
        skips = notes.get("skips", 0) + 1
        newest = self._checkpoints.wait()
        if self._config.on_nonfinite != "skip" or skips > MOST_SKIPS:
            there = (
                "no checkpoint can be read" if newest is None else f"the newest is step {newest}"
            )
            often = f", after {MOST_SKIPS} skips" if skips > MOST_SKIPS else ""
            raise UserError(
                f"{found}{often}; it is not saved, {there}, and the same command would come to it "
                "again: lower config.learning_rate or try config.dtype=float32, in a new "
                "--workdir" + ("" if often else ", or set config.on_nonfinite=skip")
            ) from found
        state, notes = self._newest()
        step = int(state.step)
        warn(
            f"{found}: back to step {step}, past batches {step + 1} to {found.step} "
            f"(skip {skips} of {MOST_SKIPS})",
            everyone=False,
        )
        notes = notes | {"skips": skips, "epoch": round(self._plan.epoch(found.step), 4)}
        moved = partial(at_step, step=found.step)
        state = jax.jit(moved, out_shardings=parallel.replicated(self._mesh))(state)
        self._done.forget_after(step)
        if self._writer:
            self._writer.close()  # lines that wait in it are of what is undone
            keep_lines(self._where, step, True)
            self._writer = MetricWriter(self._where, self._logger())
            counts = {"train/skipped": found.step - step}
            self._writer.write(found.step, self._plan.epoch(found.step), counts)
        # At once: who is stopped here must not come to it again, nor forget how often it happened.
        self._checkpoints.save(found.step, state, notes)
        return state, notes

    def _open_workdir(self, stack: contextlib.ExitStack) -> None:
        config, where, task = self._config, self._where, self._task
        with cluster.together():
            if cluster.is_first():
                _check_workdir(config, where, task)
                workdir.make(where)
                stack.enter_context(Owner(where))
                _describe(config, where, task)
        workdir.check_shared(where)
        say(
            f"{task.what} on {self._mesh.size} x {self._mesh.devices.flat[0].device_kind}; "
            f"{task.train.source.name}: {len(task.train.source)} images to train on, "
            f"{sum(len(e.examples.source) for e in task.evaluations)} to evaluate on; "
            f"workdir {where}"
        )
        programs.describe(task.kernels)
        spanning = parallel.spanning_groups(
            config.batch_size, config.group_size, self._mesh.size, config.gradient_accumulation
        )
        if spanning and not config.freeze_batch_norm:
            warn(spanning, everyone=False)

    def _close_checkpoints(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Waits for a save in flight; not after what the other processes know nothing of."""
        if kind is None or issubclass(kind, UserError) or not cluster.joined():
            self._checkpoints.close()

    def _newest(self) -> tuple[TrainState, dict[str, Any]]:
        """The newest sound checkpoint's state, or a new one, from `init_from` where that is given.

        Returns:
          The state, and the notes that were kept with it.
        """
        config, task = self._config, self._task
        create = partial(init_state, task.init, self._plans.tx, ema=config.ema_decay > 0)
        key, whole = jax.random.key(config.seed), parallel.replicated(self._mesh)
        options = UNOPTIMIZED if jax.default_backend() == "cpu" else None
        make = jax.jit(lambda key: create(key=key), out_shardings=whole, compiler_options=options)
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
            make.eval_shape(key),  # traced once for both
        )
        if restored := self._checkpoints.restore_newest(abstract):
            step, state, notes = restored
            say(f"continuing after step {step}")
            return state, notes
        path, ema = config.init_from, config.init_from_ema
        found = read_alike(path, ema) if path else None
        state = make(key)
        if found is None:
            return state, {}
        variables = jax.device_put(task.adopt(state.variables, found, False), whole)
        say(f"starting from {found.source}")
        # A copy: two leaves of one donated state must not share a buffer.
        ema = jax.tree.map(jnp.copy, variables) if state.ema else {}
        return state.replace(**variables, ema=ema), {}

    def _read_given(self, step: int) -> tuple[Callable | None, tuple[Any, ...]]:
        """The `prepare` that takes what is given, and that, on the devices; nothing where none is.

        Raises:
          UserError: it cannot be read, or is not what the run has learned from up to here.
        """
        if (given := self._task.given) is None:
            return None, ()
        found = read_alike(given.path, given.ema)
        with cluster.together():
            prepare, tree = given.use(found)
            record = self._where / workdir.GIVEN
            text = json.dumps({"sha256": digest(tree)}) + "\n"
            before = workdir.read_text(record)
            if step and before not in (None, text):
                raise UserError(
                    f"{found.source} is not what the run in {self._where} has learned from: its "
                    "weights are others; bring those back (of a run, name checkpoints/STEP), or "
                    "start another --workdir"
                )
        with cluster.together():
            if cluster.is_first():
                workdir.replace(record, text)
        return prepare, (jax.device_put(tree, parallel.replicated(self._mesh)),)

    def _compile(self, state: TrainState, key: jax.Array) -> Callable:
        start = time.monotonic()
        prepare, given = self._given
        train_step = train_step_of(self._config, self._task, self._plans.tx, self._mesh, prepare)
        batch = abstract_batch(share_spec(batch_spec(self._task.train)), self._config.batch_size)
        compiled = compile_step(train_step, state, batch, key, *given, mesh=self._mesh, donate=True)
        say(f"compiled the training step in {time.monotonic() - start:.0f} s")
        return lambda state, batch, key: compiled(state, batch, key, *given)

    def _result(self, step: int) -> str:
        """The last line of a run: where it is, how good it is, where everything lies."""
        found = self._done.of(step)
        metrics = f", {self._evaluator.describe(found)}" if found else ""
        return f"step {step} of {self._plan.steps}{metrics}; see {self._where}"


def _check_workdir(config: ConfigDict, where: Path, task: Task) -> None:
    """Checks that the run in the workdir, if there is one, has this recipe and these classes."""
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


def _describe(config: ConfigDict, where: Path, task: Task) -> None:
    """Writes what a run is into its workdir."""
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
