"""The gradients of a batch: of all of it at once, or part by part, which takes less memory.

Accumulation changes neither what is learned nor when: an update has the same examples, augmented
alike. Equal to the batch at once, but for the order of sums, are losses that are means over equal
shares of the batch, and BatchNorm's statistics, because parts consist of whole groups, all of them
start from the statistics before the step, and a running statistic moves by the mean of what the
groups move it.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stvit_jax.training.task import Batch

# ((loss, (batch_stats, scalars)), gradients), as `jax.value_and_grad` of an objective has it.
Gradients = Callable[..., tuple[tuple[jax.Array, tuple[Any, dict[str, jax.Array]]], Any]]


def at_once(objective: Callable) -> Gradients:
    """The objective of a `Task` and its gradients in the parameters."""
    return jax.value_and_grad(objective, has_aux=True)


def accumulated(objective: Callable, parts: int, group_size: int, mesh: Mesh) -> Gradients:
    """As `at_once`, with only one part of the batch in the network at a time.

    The sums are in the dtypes of what is added: those of gradients are the parameters'.

    Args:
      objective: of a `Task`.
      parts: how many the batch is cut into; 1: `at_once`.
      group_size: neighbours in the batch that stay together, see `split`; 0: none.
      mesh: over which the batch is sharded.
    """
    gradients = at_once(objective)
    if parts == 1:
        return gradients

    def of_batch(params: Any, batch_stats: Any, batch: Batch, key: jax.Array, step: jax.Array):
        def of_part(part: Batch):
            (loss, (after, scalars)), grads = gradients(params, batch_stats, part, key, step)
            # What is frozen moves by nothing, exactly; counters move by one, whatever their size.
            moved = jax.tree.map(jnp.subtract, after, batch_stats)
            return (loss, (moved, scalars)), grads

        def add(total: Any, part: Batch):
            return jax.tree.map(jnp.add, total, of_part(part)), None

        each = split(batch, parts, group_size, mesh)
        like = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], each))
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        total, _ = jax.lax.scan(add, nothing, each)
        (loss, (moved, scalars)), grads = jax.tree.map(
            lambda x: x // parts if jnp.issubdtype(x.dtype, jnp.integer) else x / parts, total
        )
        return (loss, (jax.tree.map(jnp.add, batch_stats, moved), scalars)), grads

    return of_batch


def split(batch: Batch, parts: int, group_size: int, mesh: Mesh) -> Batch:
    """A batch (B, ...) as (parts, B / parts, ...), every part sharded over the whole mesh.

    Each device takes a part of the part from the examples that it has, and none moves, where its
    share of the batch is a multiple of `parts * group_size`; groups of several devices move.

    Args:
      batch: arrays with the examples first.
      parts: divides B into multiples of the mesh's size and of `group_size`.
      group_size: neighbours that stay together, in this order; 0: none.
      mesh: over which the batch is sharded.
    """

    def of(x: jax.Array) -> jax.Array:
        size = x.shape[0]
        # Stretches of the batch that give an equal share of each part: devices, if groups fit.
        stretches = math.gcd(mesh.size, size // (parts * (group_size or 1)))
        x = x.reshape(stretches, parts, size // (stretches * parts), *x.shape[1:])
        x = x.swapaxes(0, 1).reshape(parts, size // parts, *x.shape[3:])
        by_example = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
        return jax.lax.with_sharding_constraint(x, by_example)

    return jax.tree.map(of, batch)
