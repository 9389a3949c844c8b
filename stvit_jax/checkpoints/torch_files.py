"""Reading and writing `.pth` files, which are pickles, without trusting them; imports torch lazily.

A pickle is a program, so that a file is examined before anything of it is loaded: it must be a zip
archive whose members all lie inside the file, uncompressed, and its pickle may name nothing outside
`_ALLOWED`. `torch.load(weights_only=True)` then loads it, with the same few names permitted. There
is no fallback: what does not pass is refused, whatever it may be.
"""

import argparse
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from stvit_jax.errors import UserError

_OLDEST = (2, 10)  # before: CVE-2025-32434 and CVE-2026-24747, holes in weights_only
_INSTALL = "pip install 'torch>=2.10' (.safetensors files and Orbax directories need no torch)"

# Storage types name the dtypes; the rest is what a training checkpoint holds besides tensors.
_STORAGES = {
    f"torch.{kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int")
}
_ALLOWED = _STORAGES | {
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "collections.OrderedDict",
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",  # as numpy 1 writes it
    "numpy._core.multiarray.scalar",  # as numpy 2 does
    "_codecs.encode",  # the bytes of a numpy scalar
}


def read(path: Path) -> Any:
    """What `torch.save` wrote to `path`, with torch's tensors.

    Memory stays within a small multiple of the file's size, whatever its headers say.

    Raises:
      UserError: no torch or an old one; not a file of `torch.save`, damaged, or with more in it
        than weights and plain training state.
    """
    torch = _import_torch()
    _examine(path)
    scalars = [
        (_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")
    ]  # ours in the place of numpy's, which would allocate whatever size a dtype claims
    kinds = [type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")]
    try:
        with torch.serialization.safe_globals([argparse.Namespace, np.dtype, *kinds, *scalars]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything on damaged files
        # Torch begins with the advice to trust the file.
        text = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split())
        reason = text[:200] or type(error).__name__
        raise UserError(f"{path} is damaged, or not what torch.save writes: {reason}") from error


def arrays(tensors: Mapping[str, Any], path: Path) -> dict[str, np.ndarray]:
    """Copies of tensors that `read` gave; floats of less than 32 bits are widened, exactly.

    Raises:
      UserError: an entry that is not a named tensor, or tensors that are larger than the file.
    """
    torch = _import_torch()
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(
                f"{path} holds no state dict: under {name!r} is {type(value).__name__}, no tensor"
            )
    # A tensor can claim to repeat a few bytes of the file endlessly.
    if (claimed := sum(t.nbytes for t in tensors.values())) > (size := path.stat().st_size):
        raise UserError(f"{path} is damaged: it has {size} bytes, its tensors claim {claimed}")
    copies = {}
    for name, tensor in tensors.items():
        narrow = tensor.is_floating_point() and tensor.itemsize < 4
        copies[name] = np.array((tensor.detach().float() if narrow else tensor.detach()).numpy())
    return copies


def write(path: Path, state_dict: Mapping[str, np.ndarray], beside: dict[str, Any]) -> None:
    """Writes `{"model": state_dict}`, and what is to stand beside it.

    Raises:
      UserError: no torch or an old one.
    """
    torch = _import_torch()
    tensors = {name: torch.from_numpy(array) for name, array in state_dict.items()}
    torch.save({"model": tensors, **beside}, path)


def _import_torch() -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise UserError(f".pth files need PyTorch: {_INSTALL}") from error
    numbers = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if not numbers or tuple(map(int, numbers.groups())) < _OLDEST:
        raise UserError(f"torch {torch.__version__} cannot read files safely: {_INSTALL}")
    return torch


def _examine(path: Path) -> None:
    """Raises UserError unless the archive is sound and its pickle names only what is allowed."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            stored = all(
                m.compress_type == zipfile.ZIP_STORED and m.file_size == m.compress_size
                for m in members
            )
            if not stored or sum(m.file_size for m in members) > size:
                raise UserError(
                    f"{path} is not a file that torch.save wrote: its {size} bytes claim to hold "
                    f"{sum(m.file_size for m in members)}"
                )
            pickles = [m for m in members if re.fullmatch(r"[^/]*/data\.pkl", m.filename)]
            if len(pickles) != 1:
                raise UserError(f"{path} is an archive, but not one that torch.save wrote")
            program = archive.read(pickles[0])
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, EOFError) as error:
        with path.open("rb") as file:
            start = file.read(4)
        if start == b"PK\x03\x04":
            reason = "is truncated or damaged: download or copy it again"
        elif start[:1] == b"\x80":
            reason = (
                "is a bare pickle, as torch before 1.6 wrote it; it is not opened: "
                "torch.load and torch.save it where you trust it"
            )
        else:
            reason = "is not a file that torch.save wrote"
        raise UserError(f"{path} {reason}") from error
    if foreign := sorted(_names(program, path) - _ALLOWED):
        raise UserError(
            f"{path} asks for {', '.join(foreign)}, which weights never need; nothing of it was "
            "run, do not trust this file"
        )


def _names(program: bytes, path: Path) -> set[str]:
    """Every function and class that a pickle names; nothing is imported."""
    names = set()
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name in ("GLOBAL", "INST"):
                names.add(".".join(argument.split(" ")))
            elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                names.add("what a computed name stands for")
    except Exception as error:  # whatever bytes that are no pickle lead to
        raise UserError(f"{path} is damaged: what lists its tensors is no pickle") from error
    return names


def _scalar(dtype: np.dtype, data: bytes) -> np.generic:
    return np.frombuffer(data, dtype, 1)[0]
