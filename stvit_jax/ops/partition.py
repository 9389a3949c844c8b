"""Kernels on several devices: a compiler that cannot look into a call is told how to split it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def by_image(function: Callable, split: Sequence[bool], *arguments: jax.Array) -> Any:
    """Calls `function`, every device with the images that it has.

    Nothing moves where images are sharded by the first axis, and every device has a multiple of
    what one row of the shortest result stands for.

    Args:
      function: arrays to a tuple of arrays, the first axis of which goes by images.
      split: of each argument, whether its first axis goes by images; else every device has it
        whole. The first does.
      *arguments: what it is called with.
    """
    results = jax.eval_shape(function, *arguments)
    arrays = [x for x, by_images in zip(arguments, split, strict=True) if by_images]
    shares = min(x.shape[0] for x in (*arrays, *results))
    sizes: dict[str, int] = {}
    names = (f"n{i}" for i in range(1000))
    whole = []

    def axes(x: Any, by_images: bool) -> str:
        """Names of the axes of x; `b` alone may be sharded."""
        words = [next(names) for _ in x.shape]
        whole.extend(words)
        if by_images:
            if x.shape[0] == shares:
                whole.remove(words[0])
                words[0] = "b"
            else:
                sizes[words[0]] = x.shape[0] // shares
                words[0] = f"(b {words[0]})"
        return " ".join(words)

    rule = ", ".join(axes(x, s) for x, s in zip(arguments, split, strict=True))
    rule += " -> " + ", ".join(axes(x, True) for x in results)

    def partition(mesh: Any, arguments: Any, results: Any) -> tuple:
        spec = arguments[0].sharding.spec
        by_first = NamedSharding(mesh, PartitionSpec(spec[0] if len(spec) else None))
        replicated = NamedSharding(mesh, PartitionSpec())
        wanted = tuple(by_first if by_images else replicated for by_images in split)
        return mesh, function, (by_first,) * len(results), wanted

    call = custom_partitioning(function)
    call.def_partition(
        partition=partition,
        sharding_rule=rule,
        need_replication_factors=tuple(whole),
        **sizes,
    )
    return call(*arguments)
