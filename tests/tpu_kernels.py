"""Compiles the Pallas TPU kernels for every map of the published networks, and prints how many.

    python -m tests.tpu_kernels v5e:1x1

Fails where the compiler does, or where it copies a map on the way into a kernel or out of it: for
128 images the program must move what the kernel moves. `test_compilers.py` runs it.
"""

import sys
from collections.abc import Iterator
from functools import partial

from benchmarks import compilers

STAGES = ((64, 96), (128, 192), (320, 384, 448), (512, 640))  # widths of small, base and large
SLACK = 1.08  # of weights and partial sums against a map: most on the lanes of 14x14 pixels


def maps() -> Iterator[tuple[tuple[int, int, int, int], bool]]:
    """Every shape, and whether a GELU is there: positional on C channels, in the FFN on 4C."""
    for batch in (1, 128):
        for size in (224, 384):
            for stage, widths in enumerate(STAGES):
                side = size // 2 ** (stage + 2)
                for width in widths:
                    yield (batch, side, side, width), False
                    yield (batch, side, side, 4 * width), True


def main(target: str) -> None:
    compilers.prepare(target)
    import jax
    import jax.numpy as jnp
    from jax.experimental.layout import Format, Layout

    from stvit_jax.ops.depthwise_tpu import gelu_depthwise, gelu_depthwise_gradient

    # As in a network, where XLA chooses in which order a map lies in memory.
    chip = Format(Layout.AUTO, jax.sharding.SingleDeviceSharding(compilers.devices(target)[0]))
    count = 0
    for shape, gelu in maps():
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        taps, bias = (jax.ShapeDtypeStruct((*n, shape[-1]), jnp.float32) for n in ((9,), ()))
        for function, arguments, crossings in (
            (gelu_depthwise, (x, taps, bias), 2),
            (gelu_depthwise_gradient, (x, taps, x), 3),
        ):
            jitted = jax.jit(partial(function, gelu=gelu), in_shardings=chip, out_shardings=chip)
            compiled = jitted.lower(*arguments).compile()
            text = compiled.as_text()
            assert text.count('custom_call_target="tpu_custom_call"') == 1, (shape, function)
            moved = compiled.cost_analysis()["bytes accessed"] / (2 * x.size)
            print(function.__name__, shape, f"{moved:.3f} crossings")
            assert shape[0] == 1 or moved < SLACK * crossings, (shape, function, moved)
            count += 1
    print(f"{count} kernels compiled for {target}")


if __name__ == "__main__":
    main(sys.argv[1])
