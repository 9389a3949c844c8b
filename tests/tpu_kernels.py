"""Compiles the Pallas TPU kernels for every map of the published networks, and counts them.

    python -m tests.tpu_kernels v5e:1x1 [all]

By default for the published batch at 224 pixels; all: for one image, and at 384, too.
Fails where the compiler does, or where it copies a map on the way into a kernel or out of it: for
128 images the program must move what the kernel moves. `test_compilers.py` runs it.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial

from benchmarks import compilers

# Widths and heads of small, base and large, and the pixels along a cell of super tokens.
STAGES = (
    (8, {64: 1, 96: 2}),
    (4, {128: 2, 192: 3}),
    (1, {320: 5, 384: 6, 448: 7}),
    (1, {512: 8, 640: 10}),
)
PUBLISHED, ALL = ((128, 224),), tuple(itertools.product((1, 128), (224, 384)))
SLACK = 1.08  # of weights and partial sums against a map: most on the lanes of 14x14 pixels


def calls(batch: int, size: int) -> Iterator[tuple[Callable, tuple[tuple[int, ...], ...], int]]:
    """Every kernel, the shapes of what it takes, and how often maps of the first of them cross."""
    from stvit_jax.ops import attention_tpu, depthwise_tpu

    for stage, (cell, widths) in enumerate(STAGES):
        side = size // 2 ** (stage + 2)
        for width, heads in widths.items():
            for c, gelu in ((width, False), (4 * width, True)):  # positional, and in the FFN
                x, taps = (batch, side, side, c), (9, c)
                forward = partial(depthwise_tpu.gelu_depthwise, gelu=gelu)
                yield forward, (x, taps, (c,)), 2
                yield partial(depthwise_tpu.gelu_depthwise_gradient, gelu=gelu), (x, taps, x), 3
            tokens = (side // cell) ** 2
            qkv, y = (batch, tokens, 3 * width), (batch, tokens, width)
            yield partial(attention_tpu.attention, heads=heads), (qkv,), 4 / 3
            yield partial(attention_tpu.attention_gradient, heads=heads), (qkv, y), 7 / 3


def main(target: str, which: str = "") -> None:
    compilers.prepare(target)
    import jax
    import jax.numpy as jnp
    from jax.experimental.layout import Format, Layout

    # As in a network, where XLA chooses in which order a map lies in memory.
    chip = Format(Layout.AUTO, jax.sharding.SingleDeviceSharding(compilers.devices(target)[0]))
    count = 0
    for batch, size in ALL if which == "all" else PUBLISHED:
        for function, shapes, crossings in calls(batch, size):
            arguments = [
                jax.ShapeDtypeStruct(shape, jnp.float32 if len(shape) < 3 else jnp.bfloat16)
                for shape in shapes
            ]
            jitted = jax.jit(function, in_shardings=chip, out_shardings=chip)
            compiled = jitted.lower(*arguments).compile()
            assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
            moved = compiled.cost_analysis()["bytes accessed"] / (2 * math.prod(shapes[0]))
            print(function.func.__name__, shapes[0], f"{moved:.3f} crossings")
            assert batch == 1 or moved < SLACK * crossings
            count += 1
    print(f"{count} kernels compiled for {target}")


if __name__ == "__main__":
    main(*sys.argv[1:])
