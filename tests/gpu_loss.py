"""Compiles what enlarges logits and maps of UPerNet for an H100, and prints what it moves.

    python -m tests.gpu_loss

The enlarged logits are 157 MB an image, which neither may write. `test_compilers.py` runs it.
"""

from benchmarks import compilers, traffic

IMAGES = 16
MOST = {"loss": 187, "enlarged": 21.1}  # MB an image


def main() -> None:
    compilers.prepare("h100")
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from stvit_jax import parallel
    from stvit_jax.ops import resize, segmentation

    device = SingleDeviceSharding(compilers.devices("h100")[0])

    def loss(logits, labels):
        def both(logits):
            return tuple(
                f(logits, labels) for f in (segmentation.cross_entropy, segmentation.accuracy)
            )

        return jax.value_and_grad(both, has_aux=True)(logits)

    def enlarged(maps):
        return resize.bilinear(maps, (128, 128))

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((IMAGES, *shape), dtype, sharding=device)

    labels = array(jnp.uint8, 512, 512)
    for function, arguments in (
        (loss, (array(jnp.float32, 128, 128, 150), labels)),
        (enlarged, (array(jnp.bfloat16, 64, 64, 512),)),
    ):
        lowered = jax.jit(function, out_shardings=device).lower(*arguments)
        program = lowered.compile(parallel.compiler_options("gpu"))
        moved = sum(k.bytes for k in traffic.kernels(program.as_text())) / IMAGES / 1e6
        print(f"{function.__name__}: {moved:.1f} MB an image")
        assert moved < MOST[function.__name__], (function, moved)
    print("nothing enlarged is written")


if __name__ == "__main__":
    main()
