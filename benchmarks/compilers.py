"""The compilers of accelerators that are not there: the step of a config for a GPU or TPU slice.

They are those that the accelerators have themselves: jax's CUDA plugin with ptxas, and libtpu
(requirements-compilers.txt). Nothing is executed. A process compiles for one of them, because each
is set up by the environment, which is read once: `prepare` comes before anything that imports JAX.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stvit_jax import parallel
from stvit_jax.errors import UserError, did_you_mean, one_line
from stvit_jax.validation import validate

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of accelerator.

    Attributes:
      memory: bytes of a chip.
      packages: that compile for it.
      environment: of a process that does.
      options: of the description of a slice.
      described: of a GPU, the file beside this one in which XLA describes the device.
    """

    memory: int
    packages: tuple[str, ...]
    environment: dict[str, str]
    options: dict[str, str] = dataclasses.field(default_factory=dict)
    described: str | None = None


LIBTPU = {
    "XLA_FLAGS": "",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # of no chip that is there; a slice is described anyway
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# The plugin alone would never call ptxas.
CUDA_PACKAGES = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12")
CUDA = {
    # Without a device nothing can be timed, and Triton's default tiles can fail.
    "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0",
    "MOSAIC_GPU_DUMP_PTXAS": "1",  # registers and spills of our kernels
}
CHIPS = {
    "h100": Chip(80 * GIB, CUDA_PACKAGES, CUDA, described="gpu_target_h100.txtpb"),
    "a100": Chip(80 * GIB, CUDA_PACKAGES, CUDA, described="gpu_target_a100.txtpb"),
    # As JAX runs on one: the two cores of a chip are one device.
    "v4": Chip(32 * GIB, ("libtpu",), LIBTPU, {"chip_config_name": "megacore"}),
    "v5e": Chip(16 * GIB, ("libtpu",), LIBTPU),
    "v6e": Chip(32 * GIB, ("libtpu",), LIBTPU),
}
EXAMPLES = "h100, h100:4, a100, v5e:2x4, v5e:16x16, v4:2x2x4, v6e:16x16"


def chip_of(target: str) -> Chip:
    """The chip of a target: `h100`, `h100:4` (so many of a host) or a TPU slice, `v5e:2x4`.

    Raises:
      UserError: it is none.
    """
    kind, _, shape = target.partition(":")
    if kind not in CHIPS:
        hint = did_you_mean(kind, CHIPS)
        raise UserError(f"--target {one_line(target)} is unknown; {hint}such as {EXAMPLES}")
    if not re.fullmatch(
        r"([1-9]\d*)?" if CHIPS[kind].described else r"[1-9]\d*(x[1-9]\d*)+", shape
    ):
        raise UserError(f"--target {one_line(target)} is no shape of {kind}; such as {EXAMPLES}")
    return CHIPS[kind]


def missing_packages(target: str) -> list[str]:
    """What is not installed of what compiles for a target."""
    installed = {d.name.lower() for d in importlib.metadata.distributions()}
    return sorted(set(chip_of(target).packages) - installed)


def prepare(target: str) -> None:
    """Sets the environment for a target; before JAX is used.

    Raises:
      UserError: no such target, or its compiler is not installed.
    """
    if missing := missing_packages(target):
        raise UserError(
            f"to compile for {target}, {', '.join(missing)} must be installed: "
            "pip install -r requirements-compilers.txt"
        )
    os.environ |= chip_of(target).environment | {"JAX_PLATFORMS": "cpu"}


@dataclasses.dataclass
class Ptxas:
    """What ptxas says of the kernels of our own that were compiled, each as often as it was.

    Attributes:
      registers: of a thread.
      spilled: bytes that found no register.
    """

    registers: list[int] = dataclasses.field(default_factory=list)
    spilled: list[int] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def heard() -> Iterator[Ptxas]:
    """Collects what ptxas prints, from below Python; all else is printed when the block ends."""
    said = Ptxas()
    with tempfile.TemporaryFile() as file:
        before = {n: os.dup(n) for n in (1, 2)}
        for n in before:
            os.dup2(file.fileno(), n)
        try:
            yield said
        finally:
            for n, descriptor in before.items():
                os.dup2(descriptor, n)
                os.close(descriptor)
            file.seek(0)
            for line in file.read().decode(errors="replace").splitlines():
                if found := re.search(r"Used (\d+) registers", line):
                    said.registers.append(int(found[1]))
                elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
                    said.spilled.append(int(found[1]) + int(found[2]))
                elif not re.match(r"ptxas info|\s*$", line):
                    print(line, file=sys.stderr)


def devices(target: str) -> list[Any]:
    """The chips of a target.

    Raises:
      UserError: a slice that is not built.
    """
    import jax
    from jax.experimental.topologies import get_topology_desc

    jax.devices()  # has jax find its plugins
    kind, _, shape = target.partition(":")
    if file := CHIPS[kind].described:
        from jax._src.cudnn import fused_attention_stablehlo

        # JAX asks the device's cuDNN; of the program only a call of it is seen here.
        fused_attention_stablehlo.check_cudnn_version = lambda: 91002
        described = (Path(__file__).parent / file).read_text()
        shape = f"1x1x{shape or 1}"  # slices x hosts x devices
        topology = get_topology_desc(kind, "cuda", topology=shape, target_config=described)
        return list(topology.devices)
    options: dict[str, Any] = dict(CHIPS[kind].options)
    if set(shape) <= set("1x"):
        options["chips_per_host_bounds"] = (1, 1, 1)  # else whole hosts, of four
    try:
        return list(get_topology_desc(target, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--target {target}: {one_line(error)}; such as {EXAMPLES}") from None


@dataclasses.dataclass(frozen=True)
class Program:
    """A step and its abstract arguments, as a run of a config makes them."""

    step: Callable
    arguments: list[Any]  # state, batch, and what else it takes
    batch_size: int  # global
    mesh: "Mesh"
    donate: bool

    def compile(self) -> Any:
        """The compiled step, as the run compiles it."""
        from stvit_jax.training.step import compile_step

        return compile_step(self.step, *self.arguments, mesh=self.mesh, donate=self.donate)


def program(config: "ConfigDict", mode: str, chips: list[Any]) -> Program:
    """The train step of a config (`mode` train), or its first evaluation's (infer), on chips.

    The pictures are random ones of the number and classes of ImageNet's, the scenes of ADE20K's: no
    data set is opened.

    Raises:
      UserError: a mistake in the config.
    """
    import jax
    import numpy as np

    from stvit_jax import plans, tasks
    from stvit_jax.data.batching import Batching
    from stvit_jax.data.examples import batch_spec
    from stvit_jax.training.step import abstract_batch, init_state

    with config.unlocked():
        config.data.source, config.robustness = "fake", ()
    validate(config)
    mesh = parallel.make_mesh(config.batch_size, config.gradient_accumulation, chips)
    task = tasks.build(config, mesh)
    tx = plans.Plans.of(config, task).tx
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: init_state(task.init, tx, key, config.ema_decay > 0), key)
    if mode == "infer":
        # As eval_only has it.
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state.variables)
        variables = jax.eval_shape(lambda: task.fold(zeros))
        evaluation = task.evaluations[0]
        size = evaluation.batch_size or config.batch_size
        batch = abstract_batch(Batching.of(evaluation.examples, size).specs[0], size)
        return Program(evaluation.measure, [variables, batch], size, mesh, donate=False)
    step, size = plans.train_step_of(config, task, tx, mesh), config.batch_size
    batch = abstract_batch(batch_spec(task.train), size)
    return Program(step, [state, batch, key], size, mesh, donate=True)
