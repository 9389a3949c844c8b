"""Kernels on several devices: a compiler that cannot look into a call is told how to split it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def by_image(function: Callable, split: Sequence[bool], devices: int, *arguments: jax.Array) -> Any:
    """Calls `function`, every device with the images that it has; none moves.

    Args:
      function: arrays, and by name `rows`, to a tuple of arrays, the first axis of which goes by
        images or has so many rows, for what is summed: a row of each device.
      split: of each argument, whether its first axis goes by images; else every device has it
        whole. The first does.
      devices: that share the images evenly, by the first axis; 1, or others: it is a plain call.
      *arguments: what it is called with.
    """
    images = arguments[0].shape[0]
    if devices == 1 or images % devices:
        return function(*arguments, rows=1)
    sizes: dict[str, int] = {}
    names = (f"n{i}" for i in range(1000))
    whole, alone = [], set()

    def axes(x: Any, by_images: bool) -> str:
        """Names of the axes of x; `b`, of the devices, alone may be sharded."""
        words = [next(names) for _ in x.shape]
        whole.extend(words)
        if by_images and x.shape[0] == devices:
            whole.remove(words[0])
            words[0] = "b"
            alone.add("b")
        elif by_images:
            sizes[words[0]] = x.shape[0] // devices
            words[0] = f"(b {words[0]})"
        return " ".join(words)

    def with_rows(rows: int) -> Callable:
        return lambda *arguments: function(*arguments, rows=rows)

    results = jax.eval_shape(with_rows(devices), *arguments)
    operands = [axes(x, by_images) for x, by_images in zip(arguments, split, strict=True)]
    rule = ", ".join(operands) + " -> " + ", ".join(axes(x, True) for x in results)

    def partition(mesh: Any, arguments: Any, results: Any) -> tuple:
        spec = arguments[0].sharding.spec
        axis = spec[0] if len(spec) else None
        by_first = NamedSharding(mesh, PartitionSpec(axis))
        replicated = NamedSharding(mesh, PartitionSpec())
        wanted = tuple(by_first if by_images else replicated for by_images in split)
        over = () if axis is None else (axis,) if isinstance(axis, str) else axis
        rows = devices // math.prod(mesh.shape[name] for name in over)
        return mesh, with_rows(rows), (by_first,) * len(results), wanted

    call = custom_partitioning(with_rows(devices))
    call.def_partition(
        partition=partition,
        sharding_rule=rule,
        need_replication_factors=tuple(whole),
        # Sizes of axes that never stand alone.
        **(sizes if "b" in alone else sizes | {"b": devices}),
    )
    return call(*arguments)
