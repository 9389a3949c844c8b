"""The state of training, and the pure functions that make and change it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from stvit_jax import parallel
from stvit_jax.training import optimizer
from stvit_jax.training.gradients import Gradients
from stvit_jax.training.task import Batch, Tree, Variables, step_keys

# (state, batch, key of the run, and what is given, if anything)
TrainStep = Callable[..., tuple["TrainState", dict[str, jax.Array]]]


@flax.struct.dataclass
class TrainState:
    """Everything that a run continues from; what is random is a function of the seed and `step`.

    `ema` holds the averages of `params` and `batch_stats`, or nothing where it is off.
    """

    step: jax.Array  # () int32: optimiser steps done, batches consumed
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any

    @property
    def variables(self) -> Variables:
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_state(
    init: Callable[[jax.Array], Variables],
    tx: optax.GradientTransformation,
    key: jax.Array,
    ema: bool,
) -> TrainState:
    """The state before the first step; pure, for `jit` with output shardings or `eval_shape`."""
    variables = init(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        opt_state=tx.init(variables["params"]),
        # A copy: two leaves of one donated state must not share a buffer.
        ema=jax.tree.map(jnp.copy, variables) if ema else {},
        **variables,
    )


def at_step(state: TrainState, step: int) -> TrainState:
    """The state as if all batches up to `step` had been consumed, with no update from the rest."""

    def moved(node: Any) -> Any:
        return node._replace(count=jnp.full_like(node.count, step)) if is_schedule(node) else node

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    opt_state = jax.tree.map(moved, state.opt_state, is_leaf=is_schedule)
    return state.replace(step=jnp.full_like(state.step, step), opt_state=opt_state)


def make_train_step(
    prepare: Callable[..., Batch],
    gradients: Gradients,
    tx: optax.GradientTransformation,
    ema_decay: float,
) -> TrainStep:
    """One optimiser step as a pure function.

    Args:
      prepare: of a `Task`, or of what is `Given` to it.
      gradients: of its objective, see `gradients.py`.
      tx: the optimiser.
      ema_decay: of the moving average; 0: none.

    Returns:
      (state, batch, key of the run, *given) to (state, {"loss", "gradient_norm": global, before any
      clipping, "unreadable": how many examples of the batch did not decode, and what else the
      objective reports}).
    """

    def train_step(
        state: TrainState, batch: Batch, key: jax.Array, *given: Tree
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        before = state
        prepare_key, objective_key = step_keys(key, state.step)
        rows = {"row": jnp.arange(batch["unreadable"].shape[0])}
        (loss, (batch_stats, scalars)), grads = gradients(
            state.params,
            state.batch_stats,
            prepare(batch, prepare_key, *given) | rows,
            objective_key,
            state.step,
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        if ema_decay:
            state = state.replace(
                ema=optimizer.update_average(state.ema, state.variables, ema_decay)
            )
        if "fault" in batch:
            # The share of a process whose data have failed: nothing is learned from such a batch.
            fault = jnp.any(batch["fault"])
            state = jax.tree.map(partial(jnp.where, fault), before, state)
            scalars = scalars | {"fault": fault}
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(grads),
            # The first readable example after a damaged one stands in for it.
            "unreadable": jnp.sum(batch["unreadable"] > 0),
        }
        return state, metrics | scalars

    return train_step


def abstract_batch(spec: Mapping[str, tuple[tuple[int, ...], Any]], batch_size: int) -> Batch:
    """Shapes and dtypes of what the loader gives, to compile before the first batch is there."""
    return {
        feature: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
        for feature, (shape, dtype) in spec.items()
    }


def compile_step(
    step: Callable, state: Any, batch: Batch, *rest: Any, mesh: Mesh, donate: bool
) -> Callable:
    """Compiles a step (state, batch, ...) ahead of its first call.

    The state is replicated (and its memory reused where `donate`), the batch split by example, the
    rest and the result replicated. All arguments may be abstract.
    """
    whole, split = parallel.replicated(mesh), parallel.by_image(mesh)
    jitted = jax.jit(
        step,
        in_shardings=(whole, split, *[whole] * len(rest)),
        out_shardings=whole,
        donate_argnums=0 if donate else (),
    )
    options = parallel.compiler_options(mesh.devices.flat[0].platform)
    return jitted.lower(state, batch, *rest).compile(options)
