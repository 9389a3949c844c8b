"""Kernels on several devices: a compiler cannot look into a call, and would gather the batch."""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh, PartitionSpec


def by_image(
    function: Callable, split: Sequence[bool], mesh: Mesh | None, *arguments: jax.Array
) -> tuple[jax.Array, ...]:
    """Calls `function` on every device with the images that it has; none moves.

    Args:
      function: arrays to a tuple of arrays: maps, by images, and sums over the images, whose first
        axis is 1.
      split: of each argument, whether its first axis goes by images; else every device has it
        whole. The first does.
      mesh: of the devices that share the images, by the first axis; None: there is one.
      *arguments: what it is called with.

    Returns:
      The maps, and the sums of the devices one after the other, (devices, ...).
    """
    if mesh is None or arguments[0].shape[0] % mesh.size:
        return function(*arguments)
    by_first, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    specs = tuple(by_first if by_images else whole for by_images in split)
    # The check would ask that a kernel says how its results vary over the devices.
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=by_first, check_vma=False)(
        *arguments
    )
