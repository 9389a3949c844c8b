"""Which form of an operation runs: a kernel, where the device has one, or plain XLA."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh


class Kernels(NamedTuple):
    """The forms of the operations that have several.

    Attributes:
      attention: "cudnn" (among pixels; super tokens are plain), "pallas_tpu", or "plain".
      depthwise: the depthwise convolutions: "mosaic_gpu" (Hopper), "pallas_tpu", or "plain".
      mesh: of several devices that share a batch by its images; None: there is one. A kernel has
        to know, and gradients are summed over devices in the dtype of the parameters.
    """

    attention: str = "plain"
    depthwise: str = "plain"
    mesh: Mesh | None = None

    def describe(self) -> str:
        """For a line at the start of a run."""
        if self[:2] == PLAIN[:2]:
            return "kernels: XLA's own"
        words = {
            "plain": "XLA's own",
            "cudnn": "cuDNN's",
            "mosaic_gpu": "ours (Mosaic GPU)",
            "pallas_tpu": "ours (Pallas TPU)",
        }
        attention, depthwise = words[self.attention], words[self.depthwise]
        return f"kernels: attention {attention}, depthwise convolutions {depthwise}"


PLAIN = Kernels()


def kernels_of(dtype: Any, device: Any = None) -> Kernels:
    """What suits a compute dtype on a device: bfloat16 has kernels, everything else is plain.

    Args:
      dtype: of the maps.
      device: None: JAX's default device, which may be looked for here for the first time.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return PLAIN
    if device is None:
        device = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    if device.platform == "tpu":
        return Kernels("pallas_tpu", "pallas_tpu")
    if device.platform != "gpu" or "." not in str(capability := device.compute_capability):
        return PLAIN  # AMD's names of architectures have no dot
    generation = int(capability.split(".")[0])
    return Kernels(
        attention="cudnn" if generation >= 8 else "plain",  # Ampere and later
        # wgmma's generation is its own: sm_90a runs on nothing else.
        depthwise="mosaic_gpu" if generation == 9 else "plain",
    )


def kernels_for(choice: str, dtype: Any, mesh: Mesh, deterministic: bool) -> Kernels:
    """Those of a run.

    Args:
      choice: "auto", what suits the devices; "plain", XLA's own.
      dtype: of the maps.
      mesh: the devices.
      deterministic: whether results have to repeat bit by bit.
    """
    kernels = kernels_of(dtype, mesh.devices.flat[0]) if choice == "auto" else PLAIN
    if deterministic and kernels.attention == "cudnn":
        kernels = kernels._replace(attention="plain")  # cuDNN's gradient adds as threads come
    return kernels._replace(mesh=mesh if mesh.size > 1 else None)
