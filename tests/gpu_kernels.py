"""Compiles the kernels for Hopper for every map of the published networks, and prints how many.

    python -m tests.gpu_kernels [all]

By default for the published batch at 224 pixels and segmentation's; all: for one image, and at 384,
too.
Fails where ptxas does, where registers spill, or where a map crosses memory more often than the
kernel says. Then compiles one for four GPUs: each must take its own images, and only the gradients
of the weights be summed. `test_compilers.py` runs it.
"""

import sys
from collections.abc import Iterator
from functools import partial

from benchmarks import compilers, traffic
from benchmarks.hlo import collectives
from tests.tpu_kernels import ALL, PUBLISHED, STAGES

# Partial sums and weights against the maps, most where a map is 7x7.
SLACK = 1.1


def maps(which: str) -> Iterator[tuple[tuple[int, int, int, int], bool]]:
    """Every map, and whether a GELU is there: positional on C channels, in the FFN on 4C."""
    for batch, size in ALL if which == "all" else PUBLISHED:
        for stage, (_, widths) in enumerate(STAGES):
            side = size // 2 ** (stage + 2)
            for width in widths:
                yield (batch, side, side, width), False
                yield (batch, side, side, 4 * width), True
    for width in STAGES[0][1]:  # of segmentation, at 512: the rows that need most registers
        yield (16, 128, 128, width), False
        yield (16, 128, 128, 4 * width), True


def main(which: str = "") -> None:
    compilers.prepare("h100")
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from stvit_jax.ops.depthwise import depthwise3x3

    def gradient(x, kernel, bias, before, dy, mesh=None):
        how = dict(form="mosaic_gpu", mesh=mesh)

        def function(x, kernel, bias, *before):
            return depthwise3x3(x, kernel, bias, before=before[0] if before else None, **how)

        weights = (kernel, bias) if before is None else (kernel, bias, before)
        return jax.vjp(function, x, *weights)[1](dy)

    def arguments(shape, gelu):
        x, c = jax.ShapeDtypeStruct(shape, jnp.bfloat16), shape[-1]
        weights = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, 3, 1, c), (c,))]
        return x, *weights, weights[1] if gelu else None, x

    def forward(x, kernel, bias, before, dy):
        return depthwise3x3(x, kernel, bias, before=before, form="mosaic_gpu")

    def mesh_of(target):
        return Mesh(np.array(compilers.devices(target)), ("data",))

    def compiled(function, arguments, mesh):
        split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
        shardings = (split, whole, whole, whole, split)
        jitted = jax.jit(function, in_shardings=shardings)
        return jitted.lower(*arguments).compile().as_text()

    count, one, four = 0, mesh_of("h100"), mesh_of("h100:4")
    for shape, gelu in maps(which):
        for function, crossings in ((forward, 2), (gradient, 3)):
            with compilers.heard() as ptxas:
                program = compiled(function, arguments(shape, gelu), one)
            assert len(ptxas.registers) == 1 and not any(ptxas.spilled), (shape, gelu, ptxas)
            kernels = traffic.kernels(program)
            (own,) = (kernel.bytes for kernel in kernels if kernel.kind == "own")
            moved = own / (2 * np.prod(shape))
            print(function.__name__, shape, gelu, f"{moved:.3f} crossings", ptxas.registers)
            assert shape[0] == 1 or moved < SLACK * crossings, (shape, function, moved)
            count += 1
    print(f"{count} kernels compiled")

    for images in (512, 24, 4):  # of which a device has what four divides, and what it does not
        function = partial(gradient, mesh=four)
        program = compiled(function, arguments((images, 14, 14, 1280), True), four)
        found = collectives(program)
        assert {c.kind for c in found} == {"all-reduce"}, found
        assert {c.dtype for c in found} == {"f32"} and sum(c.elements for c in found) == 11 * 1280
        assert f"bf16[{images // 4},14,14,1280]" in program
        assert f"bf16[{images},14,14,1280]" not in program
    print("four devices: each its own images")


if __name__ == "__main__":
    main(*sys.argv[1:])
