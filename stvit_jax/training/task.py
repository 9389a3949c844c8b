"""A task: what is learned and how it is measured, as plain functions.

The task owns everything between a batch and a scalar; `step.py` everything after it. Optimiser,
schedules, checkpoints and devices are the run's. A file in `tasks/` builds a `Task` from a config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
    """

    name: str
    examples: Examples
    measure: Callable[[Variables, Batch], Tree]
    join: Callable[[Any, Tree], Any]
    finish: Callable[[Any], Metrics]
    describe: Callable[[Metrics], str]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a run trains and evaluates.

    Attributes:
      what: it is, for the console: the network's name.
      classes: names by label, kept beside the checkpoints, so that a label never changes meaning.
      init: key to the variables of the network; pure.
      train: what to train on, or None.
      objective: (params, batch_stats, batch, key, step) to (loss, (batch_stats, parts)): `key` is
        of this step, `parts` are more scalars to log.
      evaluations: at least one.
      adopt: (variables, weights out of a file, exact) to variables: what starting from, and
        evaluating (`exact`: every leaf has to come from the file), foreign weights means here.
      sheet: (batch, key) to one row of pictures an example: how training sees it.
    """

    what: str
    classes: tuple[str, ...]
    init: Callable[[jax.Array], Variables]
    train: Examples | None
    objective: Callable[..., tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]]
    evaluations: tuple[Evaluation, ...]
    adopt: Callable[[Variables, Weights, bool], Variables]
    sheet: Callable[[dict[str, np.ndarray], jax.Array], list[list[Picture]]]
