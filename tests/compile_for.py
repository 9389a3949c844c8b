"""Compiles one program for an accelerator that is not there; `test_compilers.py` runs it.

    python -m tests.compile_for h100|v5e CONFIG train|eval|too_much_shared_memory DTYPE [--whole]

The compilers are those that an H100 and a TPU v5e have themselves: jax's CUDA plugin with ptxas,
and libtpu (requirements-compilers.txt). A process compiles for one of them, because each is set up
by the environment, which is read once. Nothing is executed. `--text FILE` keeps the program.
"""

import argparse
import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "h100": {
        # Without a device nothing can be timed, and Triton's default tiles can fail.
        "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0",
    },
    "v5e": {
        "XLA_FLAGS": "",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    },
}
# What a compilation for each needs; the CUDA plugin alone would never call ptxas.
PACKAGES = {
    "h100": ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"),
    "v5e": ("libtpu",),
}
H100 = Path(__file__).parent / "golden/gpu_target_h100.txtpb"


def device(name: str) -> Any:
    """One chip to compile for."""
    import jax
    from jax.experimental.topologies import get_topology_desc

    jax.devices()  # has jax find its plugins
    if name == "h100":
        topology = get_topology_desc(
            "h100", "cuda", topology="1x1x1", target_config=H100.read_text()
        )
    else:
        topology = get_topology_desc("v5e:2x2", "tpu")
    return topology.devices[0]


def build(name: str, what: str, dtype: str, whole: bool, mesh: Any) -> tuple[Callable, list[Any]]:
    """A step and its abstract arguments, as a run of a config makes them.

    A batch is one group of the config's size; unless `whole`, every stage has one block.
    """
    import jax

    from stvit_jax import run, tasks
    from stvit_jax.config import validate
    from stvit_jax.data.examples import batch_spec
    from stvit_jax.training.step import abstract_batch, init_state

    config = importlib.import_module(f"configs.{name}").get_config()
    config.dtype, config.data.source = dtype, "fake"
    config.batch_size = config.group_size
    if not whole:
        config.model.depths = (1, 1, 1, 1)
    validate(config)
    task = tasks.build(config, mesh)
    tx = run.Plans.of(config, task).tx
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: init_state(task.init, tx, key, config.ema_decay > 0), key)
    if what == "eval":
        (evaluation,) = task.evaluations
        batch = abstract_batch(batch_spec(evaluation.examples), config.batch_size)
        return evaluation.measure, [state.variables, batch]
    batch = abstract_batch(batch_spec(task.train), config.batch_size)
    return run.train_step_of(config, task, tx, mesh), [state, batch, key]


def too_much_shared_memory() -> tuple[Callable, list[Any]]:
    """A program that ptxas must refuse: one reduction with ten results (83,200 bytes of 49,152)."""
    import jax
    import jax.numpy as jnp

    def sums(state: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        terms = tuple(batch["x"].astype(jnp.float32) * k for k in range(1, 11))
        zeros = (jnp.zeros(()),) * 10
        return jax.lax.reduce(terms, zeros, lambda a, b: tuple(map(jnp.add, a, b)), (1, 2))

    return sums, [{}, {"x": jax.ShapeDtypeStruct((128, 56, 56, 256), jnp.bfloat16)}]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("device", choices=ENVIRONMENT)
    parser.add_argument("config")
    parser.add_argument("what", choices=("train", "eval", "too_much_shared_memory"))
    parser.add_argument("dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--text", type=Path)
    args = parser.parse_args()
    os.environ |= ENVIRONMENT[args.device] | {"JAX_PLATFORMS": "cpu"}

    import numpy as np
    from jax.sharding import Mesh

    from stvit_jax.training.step import compile_step

    mesh = Mesh(np.array([device(args.device)]), ("data",))
    if args.what == "too_much_shared_memory":
        step, arguments = too_much_shared_memory()
    else:
        step, arguments = build(args.config, args.what, args.dtype, args.whole, mesh)
    start = time.monotonic()
    compiled = compile_step(step, *arguments, mesh=mesh, donate=args.what == "train")
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(f"compiled in {time.monotonic() - start:.0f} s; temporaries {temporary / 1e6:.0f} MB")
    if args.text:
        args.text.write_text(compiled.as_text())


if __name__ == "__main__":
    main()
