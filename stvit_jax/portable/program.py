"""A network as a program of `jax.export`: for CPU, NVIDIA GPU and TPU, for any number of pictures.

The file is a zip archive, its parts as they are: `program`, what `jax.export.deserialize` takes,
with the weights inside, and `meta.json`. JAX runs it for as long as it promises to: at least half a
year forward and three years back. `examples/run_exported.py` is all that it takes.
"""

import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import numpy as np

PLATFORMS = ("cpu", "cuda", "tpu")


def dumps(
    function: Callable[[jax.Array], jax.Array], image_size: int, metadata: dict[str, Any]
) -> bytes:
    """The contents of a file.

    Args:
      function: of uint8 crops (B, S, S, 3), made of what all platforms have.
      image_size: S.
      metadata: plain values.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    crops = jax.ShapeDtypeStruct((batch, image_size, image_size, 3), np.uint8)
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(crops)
    about = {"format": "jax.export", "platforms": PLATFORMS, "jax": jax.__version__}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("program", bytes(exported.serialize()))
        archive.writestr("meta.json", json.dumps(about | metadata, indent=1))
    return file.getvalue()


def loads(content: bytes) -> Callable[[np.ndarray], jax.Array]:
    """The function that a file of such contents holds."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        exported = jax.export.deserialize(bytearray(archive.read("program")))
    return jax.jit(exported.call)
