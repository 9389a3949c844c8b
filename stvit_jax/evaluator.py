"""Evaluation in a run: of a state that is being trained, or of weights and nothing else."""

import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stvit_jax import cluster, parallel, places, programs
from stvit_jax.checkpoints import weights
from stvit_jax.console import say, warn
from stvit_jax.data.batching import Batching
from stvit_jax.data.loader import eval_batches
from stvit_jax.data.prefetch import device_prefetch
from stvit_jax.data.share import Share, share_spec
from stvit_jax.errors import Interrupted, UserError, described
from stvit_jax.training import workdir
from stvit_jax.training.evaluation import AVERAGED, RAW, best, describe, evaluate
from stvit_jax.training.metrics import MetricWriter
from stvit_jax.training.signals import STOPPED, Stop
from stvit_jax.training.step import abstract_batch, compile_step
from stvit_jax.training.task import Batch, Evaluation, Metrics, Task, Tree, Variables
from stvit_jax.training.watchdog import Watchdog


class Evaluator:
    """Evaluates a task's sets; every program is compiled once."""

    def __init__(
        self,
        evaluations: tuple[Evaluation, ...],
        config: ConfigDict,
        mesh: Mesh,
        stop: Stop,
        watchdog: Watchdog,
    ) -> None:
        self._evaluations, self._config, self._mesh = evaluations, config, mesh
        self._stop, self._watchdog = stop, watchdog
        self._batchings = {
            e.name: Batching.of(e.examples, e.batch_size or config.batch_size) for e in evaluations
        }
        self._compiled: dict[tuple, Callable] = {}
        self._joined: dict[str, Any] = {}  # by name of the evaluation, of the last one

    def compile(self, variables: Variables) -> None:
        """Compiles programs ahead of the first evaluation; of several shapes, the largest."""
        for evaluation in self._evaluations:
            batching = self._batchings[evaluation.name]
            abstract = abstract_batch(share_spec(batching.specs[0]), batching.batch_size)
            self._program(evaluation, variables, abstract)

    def _program(self, evaluation: Evaluation, variables: Variables, batch: Batch) -> Callable:
        """That of a batch's shapes, compiled where there is none yet."""
        shapes = tuple((name, x.shape) for name, x in sorted(batch.items()))
        key = (evaluation.measure, shapes)
        if key not in self._compiled:
            of = len(set(map(repr, self._batchings[evaluation.name].specs)))
            which = sum(measure == evaluation.measure for measure, _ in self._compiled) + 1
            what = "the evaluation step" + (f", shape {which} of {of}," if of > 1 else "")
            self._watchdog.at(f"the compiler: {what}")
            start = time.monotonic()
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
            self._compiled[key] = compile_step(
                evaluation.measure, variables, abstract, mesh=self._mesh, donate=False
            )
            say(f"compiled {what} in {time.monotonic() - start:.0f} s")
        return self._compiled[key]

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
            batches = device_prefetch(
                share, parallel.by_image(self._mesh), interrupted=self._interrupted
            )
            with contextlib.closing(batches):
                found, self._joined[evaluation.name] = evaluate(
                    evaluation,
                    partial(self._measure, evaluation),
                    variables,
                    zip(batches, self._batchings[evaluation.name].counts, strict=True),
                    self._stop.reached,
                    share.agree,
                    self._watchdog,
                )
                metrics |= found
            if len(self._evaluations) > 1:
                say(describe(evaluation, metrics))
        return metrics

    def describe(self, metrics: Metrics) -> str:
        """All of it in words."""
        return "; ".join(filter(None, (describe(e, metrics) for e in self._evaluations)))

    def best(self, metrics: Metrics) -> tuple[float, str] | None:
        """The score of metrics in the first evaluation, and the suffix of whose it is."""
        return best(self._evaluations[0], metrics)

    def report(self, metrics: Metrics, folder: Path) -> None:
        """Lets evaluations write more of the last one, of the better weights, into a folder.

        What cannot be written is said, and ends nothing.
        """
        for evaluation in self._evaluations:
            joined = self._joined.get(evaluation.name)
            if evaluation.report is None or joined is None:
                continue
            try:
                evaluation.report(joined[best(evaluation, metrics)[1]], folder)
            except Exception as error:  # of drawing, too: what has been learned is saved
                warn(f"no report of {evaluation.name} in {folder}: {described(error)}")

    def _interrupted(self) -> bool:
        return self._stop.requested or self._watchdog.stalled

    def _batches(self, evaluation: Evaluation) -> Share:
        examples, batching = evaluation.examples, self._batchings[evaluation.name]
        size = batching.batch_size
        slots = parallel.own_slots(size, self._mesh)
        batches = eval_batches(
            examples, batch_size=size, slots=slots, workers=self._config.data.workers
        )
        return Share(batches, batching.specs, len(slots))

    def _measure(self, evaluation: Evaluation, variables: Variables, batch: Batch) -> Tree:
        return self._program(evaluation, variables, batch)(variables, batch)


def read_alike(path: str | Path, ema: bool) -> weights.Weights:
    """The weights at a path that all processes see.

    Raises:
      UserError: there are none that can be read, in one of them or in all.
    """
    with cluster.together():
        own = "of a run" if workdir.has_checkpoints(places.of(path)) else "a file, or nothing"
    first = cluster.told(own)
    with cluster.together():
        if own != first:
            raise UserError(f"{path} is {own} here, and {first} in process 0: share it")
    if own == "of a run":
        return weights.read(path, ema)  # agrees by itself on what is sound
    with cluster.together():
        return weights.read(path, ema)


def evaluate_only(
    config: ConfigDict, where: Path, task: Task, evaluator: Evaluator, mesh: Mesh
) -> int:
    """Evaluates `init_from`, or the newest checkpoint of the workdir, raw and EMA; only reads."""
    with cluster.together():
        if not config.init_from and not workdir.has_checkpoints(where):
            raise UserError(
                f"there is no checkpoint in {where} to evaluate: name weights with "
                "--config.init_from=PATH, or the workdir of a run"
            )
    path = config.init_from or where
    abstract = jax.eval_shape(task.init, jax.random.key(0))

    def adopted(ema: bool) -> tuple[Variables, weights.Weights]:
        found = read_alike(path, ema)
        with cluster.together():
            variables = task.fold(task.adopt(abstract, found, True))
        return jax.device_put(variables, parallel.replicated(mesh)), found

    variables = {}
    variables[RAW], found = adopted(config.init_from_ema)
    if not config.init_from and config.ema_decay:
        variables[AVERAGED], _ = adopted(True)
    images = sum(len(e.examples.source) for e in task.evaluations)
    names = ", ".join(e.examples.source.name for e in task.evaluations)
    try:
        if cluster.is_first():
            workdir.make(where)
    except UserError as error:  # one that may only be read can be evaluated all the same
        warn(f"{error}; the result will be on the console only")
        where = None
    programs.describe(task.kernels)
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
    evaluator.report(metrics, where)
    with contextlib.closing(MetricWriter(where)) as writer:
        writer.write(found.step or 0, found.epoch or 0.0, metrics, eval_only=True)
    return 0
