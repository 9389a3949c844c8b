"""Reading and writing files of `torch.save`, which are pickles, without trusting them.

Such a file is a zip archive of a pickle and the tensors' bytes. It is read without `torch.load`:
the archive must be sound, all of it inside the file and uncompressed; the pickle is followed by
`pickles`, which runs nothing and refuses what is not plain data; and tensors are made here, from
bytes that are really there. There is no fallback: what does not pass is refused, whatever it may
be. Torch gives the dtypes, and is imported lazily.
"""

import contextlib
import dataclasses
import io
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from stvit_jax.checkpoints import files, pickles
from stvit_jax.errors import UserError, described, listing, one_line

_OLDEST = (2, 10)  # before: CVE-2025-32434 and CVE-2026-24747, for whoever calls torch.load
_INSTALL = "pip install 'torch>=2.10' (.safetensors files and Orbax directories need no torch)"

_STORAGES = {  # types of storages name the dtypes
    "Float": "float32",
    "Double": "float64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}
_DTYPES = {
    *_STORAGES.values(),
    *("uint16", "uint32", "uint64", "complex32", "float8_e4m3fn", "float8_e4m3fnuz"),
    *("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
}
_SYSTEM = ("builtins.", "importlib.", "nt.", "os.", "posix.", "runpy.", "subprocess.", "sys.")
_MOST_AXES = 64
_REBUILD = "torch._utils._rebuild_"
_ALLOWED = {
    *(f"torch.{kind}Storage" for kind in _STORAGES),
    *(f"torch.cuda.{kind}Storage" for kind in _STORAGES),
    *(f"torch.{dtype}" for dtype in _DTYPES),
    *(f"{_REBUILD}{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
    *(f"{_REBUILD}{kind}" for kind in ("parameter_with_state", "device_tensor_from_cpu_tensor")),
    *(f"{_REBUILD}{kind}" for kind in ("qtensor", "sparse_tensor", "meta_tensor_no_storage")),
    *("torch.Size", "torch.Tensor", "torch.device", "torch.nn.parameter.Parameter"),
    *("torch.nn.parameter.Buffer", "torch.serialization._get_layout", "torch.storage.TypedStorage"),
    *("torch.storage.UntypedStorage", "torch._tensor._rebuild_from_type_v2"),
    "torch.torch_version.TorchVersion",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: in which member of the archive, and where in it, in elements."""

    storage: str
    elements: int  # of the storage; bytes, where that has no type
    typed: bool
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(path: Path) -> dict[Any, Any]:
    """What `torch.save` wrote to `path`; nothing of it is run.

    Memory and time stay within a small multiple of what the file's size asks for, whatever its
    headers say.

    Returns:
      Names to what `pickles.load` makes of tensors, whose values `arrays` gives, or of other data.

    Raises:
      UserError: no torch or an old one; not a file of `torch.save`, damaged, or with more in it
        than weights and plain data, or with no names.
    """
    _import_torch()
    with _members(path) as read_member:
        program = read_member("data.pkl")
    try:
        loaded = pickles.load(program, _ALLOWED)
    except pickles.MalformedError as error:
        raise UserError(
            f"{path} is damaged: what lists its tensors cannot be read: {error}"
        ) from None
    except pickles.ForeignError as error:
        raise UserError(f"{path} {_refusal(error.names)}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds no state dict but {_kind(loaded)}")
    return loaded


def arrays(tensors: Mapping[str, Any], path: Path) -> dict[str, np.ndarray]:
    """Values of tensors that `read` gave; floats of less than 32 bits are widened, exactly.

    Raises:
      UserError: an entry that is not a named tensor, or tensors that are larger than the file.
    """
    torch = _import_torch()
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not isinstance(name, str):
            raise UserError(
                f"{path} holds no state dict: {one_line(name.text, 100)} is no name in it"
            )
        dense = _tensor(value)
        if dense is None:
            raise UserError(
                f"{path} holds no state dict: under {one_line(repr(name), 100)} is {_kind(value)}, "
                "no plain tensor"
            )
        found[name] = dense
    # A tensor can claim to repeat a few bytes of the file endlessly.
    claimed = sum(math.prod(t.shape) * getattr(torch, t.dtype).itemsize for t in found.values())
    if claimed > (size := path.stat().st_size):
        raise UserError(f"{path} is damaged: it has {size} bytes, its tensors claim {claimed}")
    try:
        with _members(path) as read_member:
            return _copies(torch, read_member, found)
    except UserError:
        raise
    except Exception as error:  # torch raises anything on strides that lead out of a storage
        raise UserError(f"{path} is damaged: {described(error)}") from error


def write(file: BinaryIO, state_dict: Mapping[str, np.ndarray], beside: dict[str, Any]) -> None:
    """Writes `{"model": state_dict}`, and what is to stand beside it.

    Raises:
      UserError: no torch or an old one.
    """
    torch = _import_torch()
    tensors = {n: torch.from_numpy(np.require(x, requirements="W")) for n, x in state_dict.items()}
    whole = io.BytesIO()  # torch makes of a full disk something else than the system said
    torch.save({"model": tensors, **beside}, whole)
    file.write(whole.getbuffer())


def _import_torch() -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise UserError(f".pth files need PyTorch: {_INSTALL}") from error
    numbers = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if not numbers or tuple(map(int, numbers.groups())) < _OLDEST:
        raise UserError(f"torch {torch.__version__} cannot read files safely: {_INSTALL}")
    return torch


def _refusal(names: list[str]) -> str:
    modules = any(name.startswith("torch.nn.modules.") for name in names)
    if modules and not any(name.startswith(_SYSTEM) for name in names):
        return (
            f"holds a whole model ({listing(names, 3)}), and not its weights alone; nothing of it "
            "was run: save model.state_dict() where you trust it"
        )
    return (
        f"asks for {listing(names)}, which weights never need; nothing of it was run, do not trust "
        "this file; if you know what that is, save the weights alone where you trust it"
    )


def _tensor(value: Any) -> Tensor | None:
    """The tensor that a value of `read` stands for; None where it is none, or no dense one."""
    for _ in range(4):  # parameters and buffers are wrapped
        if not isinstance(value, pickles.Call):
            return None
        if value.name == "torch._tensor._rebuild_from_type_v2" and len(value.args) == 4:
            function, _, args, _ = value.args
            value = pickles.Call(getattr(function, "name", ""), args)
        elif value.name.startswith((f"{_REBUILD}parameter", f"{_REBUILD}device_tensor")):
            value = value.args[0] if value.args else None
        else:
            return _dense(value)
    return None


@contextlib.contextmanager
def _members(path: Path) -> Iterator[Callable[[str], bytes]]:
    """Reads members of the archive, by their names in its one folder, once it is known to be sound.

    Raises:
      UserError: it is not, or something raised in the block below.
    """
    start = files.beginning(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check(members, path)
            if not any(member.CRC for member in members):  # torch.save can be told to leave it out
                for member in members:
                    del member.CRC
            by_name = {member.filename.partition("/")[2]: member for member in members}
            if "byteorder" in by_name and archive.read(by_name["byteorder"]) != b"little":
                raise UserError(
                    f"{path} was written by a big-endian machine: save it again on another"
                )
            yield lambda name: archive.read(by_name[name])
    except UserError:
        raise
    except Exception as error:  # zipfile raises anything on damaged files
        if start.startswith(b"PK\x03\x04"):
            what = "is truncated or damaged: download or copy it again"
        elif start[:1] == b"\x80":
            what = (
                "is a bare pickle, as torch before 1.6 wrote it; it is not opened: "
                "torch.load and torch.save it where you trust it"
            )
        else:
            told = files.what_it_is(start)
            what = f"is not a file that torch.save wrote{': ' if told else ''}{told}"
        raise UserError(f"{path} {what}") from error


def _check(members: list[zipfile.ZipInfo], path: Path) -> None:
    """Raises UserError unless they are those of one `torch.save`, and all inside the file."""
    names = [member.filename.partition("/")[2] for member in members]
    if "constants.pkl" in names:
        raise UserError(
            f"{path} is a program of TorchScript, and not weights alone: save model.state_dict() "
            "where you trust it"
        )
    if names.count("data.pkl") != 1:
        raise UserError(
            f"{path} is an archive, but not one that torch.save wrote: it holds "
            f"{listing([member.filename for member in members], 3)}; unpack it, and give the file "
            "of weights"
        )
    if len(set(names)) != len(names):
        raise UserError(f"{path} is damaged: parts of it have the same name")
    stored = all(
        m.compress_type == zipfile.ZIP_STORED and m.file_size == m.compress_size for m in members
    )
    claimed, size = sum(member.file_size for member in members), path.stat().st_size
    if not stored or claimed > size:
        raise UserError(
            f"{path} is not a file that torch.save wrote: its {size} bytes claim to hold {claimed}"
        )


def _dense(value: pickles.Call) -> Tensor | None:
    kind = value.name.removeprefix(_REBUILD)
    if kind not in ("tensor", "tensor_v2", "tensor_v3") or len(value.args) < 4:
        return None
    storage, offset, shape, strides = value.args[:4]
    if not isinstance(storage, pickles.Persistent) or not isinstance(storage.id, tuple):
        return None
    if len(storage.id) != 5 or not isinstance(storage.id[1], pickles.Named):
        return None
    _, type_of, key, _, elements = storage.id
    shape, strides = (
        value.args[0] if isinstance(value, pickles.Call) and value.name == "torch.Size" else value
        for value in (shape, strides)
    )
    if kind == "tensor_v3":
        dtype = getattr(value.args[6], "name", "").removeprefix("torch.") if value.args[6:] else ""
    else:
        dtype = _STORAGES.get(type_of.name.rpartition(".")[2].removesuffix("Storage"), "")
    if not all(isinstance(value, tuple) and len(value) <= _MOST_AXES for value in (shape, strides)):
        return None
    numbers = all(type(n) is int and 0 <= n < 2**63 for n in (offset, elements, *shape, *strides))
    if dtype not in _DTYPES or not isinstance(key, str) or not numbers:
        return None
    return Tensor(key, elements, kind != "tensor_v3", dtype, offset, shape, strides)


def _copies(
    torch: ModuleType, read_member: Callable[[str], bytes], tensors: Mapping[str, Tensor]
) -> dict[str, np.ndarray]:
    """Every storage is read once, and let go when the last tensor in it is copied."""
    by_storage: dict[str, list[str]] = {}
    for name, where in tensors.items():
        by_storage.setdefault(where.storage, []).append(name)
    copies: dict[str, np.ndarray] = {}
    for key, names in by_storage.items():
        content = bytearray(read_member(f"data/{key}"))
        for name in names:
            where = tensors[name]
            dtype = getattr(torch, where.dtype)
            size = where.elements * (dtype.itemsize if where.typed else 1)
            if size != len(content):
                raise ValueError(f"storage {key} has {len(content)} bytes, and not {size}")
            whole = (
                torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            )
            view = whole.as_strided(where.shape, where.strides, where.offset)
            narrow = dtype.is_floating_point and dtype.itemsize < 4
            copies[name] = np.array((view.float() if narrow else view).numpy())
    return {name: copies[name] for name in tensors}


def _kind(value: Any) -> str:
    if not isinstance(value, pickles.Call):
        return type(value).__name__
    name = value.name.rpartition(".")[2].removeprefix("_rebuild_").strip("_")
    return f"a {one_line(re.sub(r'_v[0-9]$', '', name), 60)}"
