"""Exact evaluation: every example of a data set counts once, whatever a task measures on it."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from stvit_jax.console import Progress
from stvit_jax.errors import Interrupted
from stvit_jax.training.task import Batch, Evaluation, Metrics, Tree, Variables
from stvit_jax.training.watchdog import Watchdog

RAW, AVERAGED = "", "_ema"  # the suffix of an evaluation's name in metrics


def evaluate(
    evaluation: Evaluation,
    measure: Callable[[Variables, Batch], Tree],
    variables: dict[str, Variables],
    batches: Iterable[tuple[Batch, int]],
    interrupted: Callable[[], bool],
    agree: Callable[[], None],
    watchdog: Watchdog,
) -> tuple[Metrics, dict[str, Any]]:
    """Metrics of one or more sets of weights in one pass over the data.

    Args:
      evaluation: what is counted.
      measure: its `measure`, compiled for the shapes of a batch.
      variables: suffix (`RAW`, `AVERAGED`) to network variables.
      batches: of the whole data set, padded and masked, each with its count of examples.
      interrupted: whether to end early; asked before every batch.
      agree: called after the last batch; raises where another process has met a fault.
      watchdog: is told of every batch.

    Returns:
      `NAME/METRIC` for every suffix and metric; and what was joined, by suffix.

    Raises:
      Interrupted: it was ended early; nothing is known then.
      UserError: the data are damaged, or no result can be had from them.
    """
    joined: dict[str, Any] = dict.fromkeys(variables)
    size = len(evaluation.examples.source)
    watchdog.at(f"the data of {evaluation.examples.source.name}")
    progress = Progress(f"evaluating {evaluation.examples.source.name}", size)
    seen = 0
    waiting = None  # read one batch late, so that the next is already under way
    for batch, count in batches:
        if interrupted():
            raise Interrupted
        watchdog.at(f"the devices, evaluating after {seen} of {size} images")
        measured = {suffix: measure(v, batch) for suffix, v in variables.items()}
        if waiting is not None:
            _join(evaluation, joined, waiting)
        waiting = measured
        progress.update(seen := seen + count)
        watchdog.at(f"the data of {evaluation.examples.source.name} after {seen} of {size} images")
    _join(evaluation, joined, waiting)
    agree()
    metrics = {
        f"{evaluation.name}{suffix}/{key}": value
        for suffix, total in joined.items()
        for key, value in evaluation.finish(total).items()
    }
    return metrics, joined


def best(evaluation: Evaluation, metrics: Metrics) -> tuple[float, str] | None:
    """The higher score of raw and averaged weights, and the suffix of whose it is."""
    found = [
        (metrics[key], suffix)
        for suffix in (AVERAGED, RAW)  # of equals the raw ones
        if (key := f"{evaluation.name}{suffix}/{evaluation.score}") in metrics
    ]
    return max(found, default=None)


def describe(evaluation: Evaluation, metrics: Metrics) -> str:
    """What is known of one evaluation, in words; empty where nothing is."""
    parts = []
    for suffix, label in ((RAW, "raw"), (AVERAGED, "EMA")):
        prefix = f"{evaluation.name}{suffix}/"
        own = {key.removeprefix(prefix): v for key, v in metrics.items() if key.startswith(prefix)}
        if own:
            parts.append(f"{label} {evaluation.describe(own)}")
    return "; ".join(parts)


def _join(evaluation: Evaluation, joined: dict[str, Any], measured: dict[str, Tree]) -> None:
    for suffix, tree in jax.device_get(measured).items():
        joined[suffix] = evaluation.join(joined[suffix], tree)
