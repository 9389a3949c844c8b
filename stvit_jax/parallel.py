"""Devices: what has to be set before they are touched, and the mesh over all of them.

The mesh has one axis, "data". State is replicated, batches are split by example.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stvit_jax import places
from stvit_jax.console import warn
from stvit_jax.errors import UserError, one_line

if TYPE_CHECKING:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding


COLLECTIVE_PATIENCE = 600  # seconds


def prepare(*, x64: bool, deterministic: bool, workdir: Path) -> None:
    """Sets what JAX reads once, before it looks for devices.

    Args:
      x64: whether arrays may have 64 bits.
      deterministic: on a GPU, leave out operations whose result depends on the order of threads,
        and keep the choices of autotuning in the workdir, so that a restart makes the same. CPU and
        TPU repeat bit by bit as they are.
      workdir: of the run.

    Raises:
      UserError: JAX is told not to compile.
    """
    import jax

    if jax.config.jax_disable_jit:
        raise UserError("JAX_DISABLE_JIT is set, and training needs compiled steps: unset it")
    jax.config.update("jax_enable_x64", x64)
    # Between processes on CPU; on a GPU a collective that a peer has left would wait for ever.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if "xla_gpu_nccl_termination_timeout_seconds" not in os.environ.get("XLA_FLAGS", ""):
        _add_flags(f"--xla_gpu_nccl_termination_timeout_seconds={COLLECTIVE_PATIENCE}")
    if deterministic:
        _make_deterministic(workdir)


def _make_deterministic(workdir: Path) -> None:
    """Sets what can be set, and says where that is not enough; only a GPU needs any of it."""
    flag = "xla_gpu_exclude_nondeterministic_ops"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        _add_flags(f"--{flag}=true")
    elif f"--{flag}=true" not in os.environ["XLA_FLAGS"].split():
        warn(f"config.deterministic is not honoured on a GPU: XLA_FLAGS has another {flag}")
    if places.in_bucket(workdir):  # of which XLA knows nothing
        warn(
            "config.deterministic: the choices of autotuning are not kept in a bucket, so on a GPU "
            "a restart may round differently; use a workdir on a disk for that"
        )
    else:
        _add_flags(f"--xla_gpu_per_fusion_autotune_cache_dir={workdir / 'autotuning'}")


def _add_flags(*flags: str) -> None:
    os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *flags)).strip()


def compiler_options(platform: str) -> dict[str, Any]:
    """What XLA is told of a step; without it bfloat16 maps cross the memory in float32, and more.

    Args:
      platform: of the devices that it is compiled for: cpu, gpu, tpu.
    """
    # Else a result stays in float32 for the operation that takes it, and is written so.
    options: dict[str, Any] = {"xla_allow_excess_precision": False}
    if platform == "gpu":
        # Queries, keys and values as one product would have to be copied apart.
        options["xla_gpu_dot_merger_threshold_mb"] = 0
    return options


def make_mesh(batch_size: int, parts: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """All devices of all processes in a row, or those that are given.

    Args:
      batch_size: of an update.
      parts: that it is learned from one after the other.
      devices: that the mesh has; None: all.

    Raises:
      UserError: there are none, or the examples of a part cannot be split evenly over them.
    """
    import jax
    import numpy as np
    from jax.sharding import Mesh

    try:
        devices = devices or jax.devices()
    except RuntimeError as error:  # of a platform that was asked for and is not there
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"there are no devices for JAX_PLATFORMS={asked!r} ({one_line(error)}): unset it, or "
            'install what it needs: pip install "jax[cuda12]" or "jax[tpu]"'
        ) from error
    if batch_size % (len(devices) * parts):
        times = f" times config.gradient_accumulation {parts}" if parts > 1 else ""
        raise UserError(
            f"config.batch_size {batch_size} is not divisible by the {len(devices)} devices"
            f"{times}; use a multiple of {len(devices) * parts}"
        )
    return Mesh(np.asarray(devices), ("data",))


def spanning_groups(batch_size: int, group_size: int, devices: int, parts: int = 1) -> str | None:
    """What to know where groups of images do not lie within devices; None where they do.

    Args:
      batch_size: of an update.
      group_size: images that share BatchNorm statistics; 0: all that are in the network at once.
      devices: that share the batch.
      parts: that it is learned from one after the other.
    """
    share = batch_size // (devices * parts)
    group = group_size or batch_size // parts
    if share % group == 0:
        return None
    larger = f"a batch of {devices * parts * group} (or a multiple), or " if group_size else ""
    return (
        f"{share} images a device and groups of {group}: every normalisation communicates; use "
        f"{larger}config.group_size {share}"
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec())


def by_image(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec("data"))


def own_slots(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The positions of a global batch that this process loads, ascending: those of its devices.

    JAX does not promise that the devices of a process are neighbours.
    """
    return _slots(batch_size, by_image(mesh))


def from_slots(rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """The global array that is split by its leading axis, of which this process has `own_slots`."""
    import jax
    import numpy as np

    devices, own = len(sharding.device_set), len(sharding.addressable_devices)
    size = len(rows) * devices // own
    slots = _slots(size, sharding)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(size)
        first = np.searchsorted(slots, start)
        return rows[first : first + stop - start]

    return jax.make_array_from_callback((size, *rows.shape[1:]), sharding, part)


def _slots(size: int, sharding: NamedSharding) -> np.ndarray:
    import numpy as np

    slices = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[part] for (part,) in slices]))
