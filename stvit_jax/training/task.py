"""A task: what is learned and how it is measured, as plain functions.

The task owns everything between a batch and a scalar; `step.py` everything after it: also whether
a batch is learned from at once or in parts. Optimiser,
schedules, checkpoints and devices are the run's. A file in `tasks/` builds a `Task` from a config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
    from stvit_jax.checkpoints.weights import Weights
    from stvit_jax.data.examples import Examples

Batch = dict[str, jax.Array]
Variables = dict[str, Any]  # {"params": ..., "batch_stats": ...}
Tree = Any
Metrics = dict[str, float]
Picture = tuple[np.ndarray, list[str]]  # uint8 (S, S, 3), and the lines under it


def step_keys(key: jax.Array, step: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """The keys of one step, of the run's: that of `prepare`, and that of `objective`."""
    prepare, objective = jax.random.split(jax.random.fold_in(key, step))
    return prepare, objective


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A set of examples, and what is counted on it.

    Attributes:
      name: prefix in `metrics.jsonl`: `eval`, `robustness/imagenet_a`. That of averaged weights is
        `NAME_ema`.
      examples: every one counts once.
      measure: (variables, batch) to a tree of arrays, on the device; padding is where `mask` is
        False.
      join: (what is joined so far or None, a measured tree) to what is joined, on the host: sums
        add, rows append, confusion matrices add.
      finish: of everything joined, the metrics; `count` and `unreadable` always among them.
      describe: the metrics in words, for the console.
      score: the metric that tells the better of two weights, larger is better.
      report: (everything joined, folder) writes more of it there, at the end of a run.
      batch_size: of the global batch; None: that of training.
    """

    name: str
    examples: Examples
    measure: Callable[[Variables, Batch], Tree]
    join: Callable[[Any, Tree], Any]
    finish: Callable[[Any], Metrics]
    describe: Callable[[Metrics], str]
    score: str
    report: Callable[[Any, Path], None] | None = None
    batch_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Given:
    """A file that training takes something from which it does not change: a teacher's weights.

    It is read anew when a run goes on, and no part of checkpoints.

    Attributes:
      path: of weights.
      ema: whether their moving average is meant.
      use: the weights to (`prepare` of the task with what is given as a third argument, what is
        given: a tree of arrays, on the host).
    """

    path: str
    ema: bool
    use: Callable[[Weights], tuple[Callable[[Batch, jax.Array, Tree], Batch], Tree]]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a run trains and evaluates.

    Attributes:
      what: it is, for the console: the network's name.
      kernels: likewise, whose its operations are.
      classes: names by label, kept beside the checkpoints, so that a label never changes meaning.
      init: key to the variables of the network; pure.
      train: what to train on, or None.
      prepare: (batch, key) to what `objective` takes of it, examples first: augmentation and all
        that is not differentiated. Always of a whole batch.
      objective: (params, batch_stats, batch, key, step) to (loss, (batch_stats, scalars)): of a
        prepared batch, or of a part of one, in whole groups. `batch["row"]` (B,) are the examples'
        numbers in the whole batch: what is drawn for an example is keyed by them, or differs
        between a batch and its parts. Loss and `scalars`, more to log, are means over the examples.
      evaluations: at least one.
      adopt: (variables, weights out of a file, exact) to variables: what starting from, and
        evaluating (`exact`: every leaf has to come from the file), foreign weights means here.
      fold: variables to those that give the same in fewer operations, on the host; nothing is
        trained with them, and `measure` of all evaluations takes either.
      sheet: (batch, key of `prepare`) to one row of pictures an example: how training sees it.
      given: what else training needs, or None.
      multipliers: (parameters) to what the learning rate of each is multiplied with; None: 1.
    """

    what: str
    kernels: str
    classes: tuple[str, ...]
    init: Callable[[jax.Array], Variables]
    train: Examples | None
    prepare: Callable[[Batch, jax.Array], Batch]
    objective: Callable[..., tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]]
    evaluations: tuple[Evaluation, ...]
    adopt: Callable[[Variables, Weights, bool], Variables]
    fold: Callable[[Variables], Variables]
    sheet: Callable[[dict[str, np.ndarray], jax.Array], list[list[Picture]]]
    given: Given | None = None
    multipliers: Callable[[Tree], Tree] | None = None
