"""What changes in training: learning rate and drop path, as functions of the optimiser step."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from stvit_jax.errors import UserError

Schedule = Callable[[int | jax.Array], float | jax.Array]


def learning_rate(
    base: float,
    minimum: float,
    warmup_from: float,
    warmup_epochs: int,
    epochs: int,
    steps_per_epoch: int,
) -> Schedule:
    """Cosine per epoch with linear warm-up, as published (timm 0.5.4, stepped after each epoch).

    f(t) = warmup_from + t (base - warmup_from) / W for t < W, else
    minimum + (base - minimum)/2 (1 + cos(pi t / T)). Stepping after an epoch makes epochs 0 and 1
    both train at f(0), and epoch e >= 1 at f(e - 1).

    Args:
      base: peak rate, already scaled by batch / 512.
      minimum: the cosine's end, not scaled.
      warmup_from: rate of the first epoch, not scaled.
      warmup_epochs: W.
      epochs: T.
      steps_per_epoch: optimiser steps in an epoch.

    Returns:
      A function of the 0-based step: a float of an integer, an array of an array.

    Raises:
      UserError: no epoch, or no step in one.
    """

    def of(t: int) -> float:
        if t < warmup_epochs:
            return warmup_from + t * (base - warmup_from) / warmup_epochs
        return minimum + 0.5 * (base - minimum) * (1 + math.cos(math.pi * t / epochs))

    return by_epoch([of(max(epoch - 1, 0)) for epoch in range(epochs)], steps_per_epoch)


def polynomial(
    base: float,
    minimum: float,
    power: float,
    steps: int,
    warmup_steps: int = 0,
    warmup_factor: float = 1e-6,
) -> Schedule:
    """A power of what is left, by step, as in segmentation's papers (mmcv 1.x `PolyLrUpdaterHook`).

    r(t) = minimum + (base - minimum) (1 - t / T)^power, and r(t) (1 - (1 - t / W) (1 -
    warmup_factor)) for t < W. (mmengine's schedulers, which follow each other, give others.)

    Args:
      base: rate at the beginning, without warm-up.
      minimum: rate at the end, before the last step.
      power: 1 is a straight line.
      steps: T.
      warmup_steps: W.
      warmup_factor: what the first step has of its rate.

    Returns:
      A function of the 0-based step, as `learning_rate` returns it.

    Raises:
      UserError: there is no step.
    """
    t = np.arange(max(steps, 0), dtype=np.float64)
    # As sums of what is positive, so that the smallest rates, at both ends, are exact, too.
    rates = minimum + (base - minimum) * ((steps - t) / max(steps, 1)) ** power
    warmed = (t + (warmup_steps - t) * warmup_factor) / max(warmup_steps, 1)
    rates = np.where(t < warmup_steps, rates * warmed, rates)
    return by_epoch(rates, 1)


def drop_path(
    rate: float, changes: Sequence[tuple[int, float]], epochs: int, steps_per_epoch: int
) -> Schedule:
    """The drop-path rate of a step.

    Args:
      rate: of the first epochs.
      changes: (epoch, rate): from that epoch on, that rate.
      epochs: of the run.
      steps_per_epoch: optimiser steps in an epoch.

    Returns:
      A function of the 0-based step, as `learning_rate` returns it.
    """
    rates = [rate] * epochs
    for start, changed in sorted(changes):
        rates[start:] = [changed] * len(rates[start:])
    return by_epoch(rates, steps_per_epoch)


def by_epoch(values: Sequence[float], steps_per_epoch: int) -> Schedule:
    """`values[epoch]` of a step; the last value holds past the end."""
    table = np.asarray(values, np.float64)
    if not len(table) or steps_per_epoch < 1:
        raise UserError(
            f"a schedule of {len(table)} epochs of {steps_per_epoch} steps has no step: "
            "both must be at least 1"
        )

    def of_step(step: int | jax.Array) -> float | jax.Array:
        epoch = step // steps_per_epoch
        if isinstance(step, jax.Array):
            return jnp.asarray(table)[jnp.minimum(epoch, len(table) - 1)]
        if isinstance(step, np.ndarray):
            return table[np.minimum(epoch, len(table) - 1)]
        return float(table[min(epoch, len(table) - 1)])

    return of_step
