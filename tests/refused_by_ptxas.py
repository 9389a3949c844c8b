"""Compiles a program that ptxas must refuse: one reduction with ten results.

It wants 83,200 bytes of static shared memory, and an H100 has 49,152. `test_compilers.py` runs it.
"""

from benchmarks import compilers


def main() -> None:
    compilers.prepare("h100")
    import jax
    import jax.numpy as jnp

    def sums(x: jax.Array) -> tuple[jax.Array, ...]:
        terms = tuple(x.astype(jnp.float32) * k for k in range(1, 11))
        zeros = (jnp.zeros(()),) * 10
        return jax.lax.reduce(terms, zeros, lambda a, b: tuple(map(jnp.add, a, b)), (1, 2))

    chip = jax.sharding.SingleDeviceSharding(compilers.devices("h100")[0])
    x = jax.ShapeDtypeStruct((128, 56, 56, 256), jnp.bfloat16)
    jax.jit(sums, in_shardings=chip).lower(x).compile()


if __name__ == "__main__":
    main()
