"""The mesh of devices: one axis, "data". State is replicated, batches are split by image."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stvit_jax.errors import UserError


def make_mesh(batch_size: int) -> Mesh:
    """All devices of all processes in a row.

    Raises:
      UserError: `batch_size` images cannot be split evenly over them.
    """
    devices = jax.devices()
    if batch_size % len(devices):
        raise UserError(
            f"config.batch_size {batch_size} is not divisible by the {len(devices)} devices; "
            f"use a multiple of {len(devices)}"
        )
    return Mesh(np.asarray(devices), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_image(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def own_slots(batch_size: int) -> slice:
    """The part of a global batch that this process loads: its devices are neighbours."""
    share = batch_size // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)
