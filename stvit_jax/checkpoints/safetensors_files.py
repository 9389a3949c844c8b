"""Reading and writing `.safetensors` files, whole or in shards with an index."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from stvit_jax.checkpoints import files
from stvit_jax.errors import UserError, listing, one_line

INDEX = ".index.json"

_DTYPES = {
    "BOOL": np.bool_,
    **{
        f"{kind[0].upper()}{bits}": f"{kind}{bits}"
        for kind in ("int", "uint")
        for bits in (8, 16, 32, 64)
    },
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a file, and the metadata beside them.

    Raises:
      UserError: it is damaged, no such file, or of a dtype that nobody knows.
    """
    start = files.beginning(path)
    safetensors = _import_safetensors()
    try:
        content = path.read_bytes()
        # The library compares the header with the size of the file before it reads on.
        tensors = dict(safetensors.deserialize(content))
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header.get("__metadata__") or {}
    except Exception as error:  # SafetensorError, and what json makes of foreign content
        what = files.what_it_is(start) or one_line(error)
        raise UserError(f"{path} is damaged, or not a safetensors file: {what}") from error
    if strange := sorted({t["dtype"] for t in tensors.values()} - _DTYPES.keys()):
        raise UserError(f"{path} holds tensors of {listing(strange)}, which no weights are made of")
    return {name: _array(tensor) for name, tensor in tensors.items()}, metadata


def read_shards(index: Path) -> dict[str, list[str]]:
    """Of an index beside shards: file names to the names of the tensors to be taken from them.

    Raises:
      UserError: it is damaged, or leads out of its folder.
    """
    held = files.read_json(index)
    weight_map = held.get("weight_map") if isinstance(held, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{index} is no index of shards: it has no weight_map of names and files")
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        shards.setdefault(file, []).append(name)
    if outside := [file for file in shards if Path(file).name != file]:
        raise UserError(f"{index} leads out of its folder, to {listing(outside, 3)}")
    return shards


def write(file: BinaryIO, state_dict: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes tensors, and texts beside them; the same bytes for the same content.

    (The package writes the metadata in another order every time.)
    """
    names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in state_dict.items():
        start, end = end, end + array.nbytes
        form = {"dtype": names[array.dtype], "shape": list(array.shape)}
        header[name] = form | {"data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the arrays are aligned
    file.write(len(text).to_bytes(8, "little") + text)
    for array in state_dict.values():
        file.write(np.ascontiguousarray(array).data)


def _array(tensor: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])


def _import_safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise UserError(".safetensors files need: pip install safetensors") from error
    return safetensors
