"""Weights in files: `.pth`, `.safetensors`, Orbax directories and workdirs of runs, in and out.

    form            holds                                    its settings and class names lie in
    x.pth           PyTorch names under `model`              entries beside `model`
    x.safetensors   PyTorch names                            the metadata
    directory       Orbax items `weights` and `meta`         `meta`
    workdir         `checkpoints/STEP`, of a run             `config.json`, `classes.json`

Settings are called `stvit_config`, names by label `class_names`, a list. `settings.py` says what
settings are. Files of others carry none; a variant is recognised by its shapes. A file that is
written here holds one set of weights; files of training hold the moving
average besides, which `ema` asks for.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from stvit_jax import torch_weights
from stvit_jax.checkpoints import torch_files
from stvit_jax.checkpoints.reader import read_newest
from stvit_jax.errors import UserError, one_line
from stvit_jax.models.settings import SETTINGS, Settings
from stvit_jax.trees import leaves, nested, path_name

_IGNORED = {
    "model": "the raw weights; taken without ema",
    "model_ema": "the moving average; taken with ema",
    "optimizer": "training state",
    "lr_scheduler": "training state",
    "scaler": "training state",
    "epoch": "training state",
    "max_accuracy": "a note of the training",
    "args": "options of the training",
}
_COLLECTIONS = ("params/", "batch_stats/")


@dataclasses.dataclass(frozen=True)
class Weights:
    """What `read` found.

    Attributes:
      variables: `{"params": ..., "batch_stats": ...}`, numpy: float32 or float64, counters int64.
      settings: of the network, as the file carries them; None where it carries none.
      source: the file or directory that was read; of a workdir, its checkpoint.
      ignored: entries that were left out, and why.
      step: batches consumed, of a workdir's checkpoint; None otherwise.
      epoch: likewise.
      classes: names by label, where the file carries them.
    """

    variables: dict[str, Any]
    settings: Settings | None
    source: Path
    ignored: dict[str, str]
    step: int | None = None
    epoch: float | None = None
    classes: tuple[str, ...] | None = None


def read(path: str | Path, ema: bool = False) -> Weights:
    """Reads weights of any form.

    Args:
      path: see the module.
      ema: the moving average in place of the raw weights.

    Raises:
      UserError: not there, not of a known form, damaged, no STViT, or no moving average in it.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there are no weights at {path}")
    if (path / "checkpoints").is_dir():
        weights = _read_workdir(path, ema)
    elif path.is_dir():
        weights = _read_directory(path, ema)
    elif path.suffix == ".pth":
        weights = _read_pth(path, ema)
    elif path.suffix == ".safetensors":
        weights = _read_safetensors(path, ema)
    else:
        raise UserError(f"{path}: files of weights end in .pth or .safetensors")
    if not isinstance(weights.settings, dict | None):
        raise UserError(f"{path} is damaged: its stvit_config is {weights.settings!r}")
    variables = jax.tree_util.tree_map_with_path(_canonical, weights.variables)
    classes, ignored = weights.classes, weights.ignored
    if classes is not None and not _are_names(classes, variables):
        classes, ignored = None, ignored | {"class_names": "not one name for each class"}
    classes = None if classes is None else tuple(classes)
    return dataclasses.replace(weights, variables=variables, classes=classes, ignored=ignored)


def write(path: str | Path, weights: Weights) -> None:
    """Writes weights in the form that the path names; a directory unless it ends in a suffix above.

    Args:
      path: of something that is not there yet.
      weights: with settings, see `identify`.

    Raises:
      UserError: the path exists, cannot be written, or needs a package that is missing.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists; remove it, or choose another output")
    carried = {"stvit_config": weights.settings}
    if weights.classes is not None:
        carried["class_names"] = list(weights.classes)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pth":
            state_dict = torch_weights.to_torch(weights.variables)
            torch_files.write(unfinished, state_dict, carried)
        elif path.suffix == ".safetensors":
            _import_safetensors().numpy.save_file(
                torch_weights.to_torch(weights.variables),
                unfinished,
                {"format": "pt"} | {key: json.dumps(value) for key, value in carried.items()},
            )
        else:  # Orbax writes to another place and renames by itself
            meta = carried | {"sha256": _digest(weights.variables)}
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                args = ocp.args.Composite(
                    weights=ocp.args.PyTreeSave(weights.variables), meta=ocp.args.JsonSave(meta)
                )
                checkpointer.save(path.absolute(), args=args)
            return
        os.replace(unfinished, path)
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # what torch and Orbax make of a full disk
        raise UserError(f"{path} cannot be written: {one_line(error)}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _read_pth(path: Path, ema: bool) -> Weights:
    loaded = torch_files.read(path)
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path} holds no state dict but {type(loaded).__name__}")
    entries = dict(loaded) if isinstance(loaded.get("model"), Mapping) else {"model": loaded}
    tensors = entries.pop("model_ema" if ema else "model", None)
    if not isinstance(tensors, Mapping):
        raise _no_average(path)
    settings, classes = entries.pop("stvit_config", None), entries.pop("class_names", None)
    ignored = {str(key): _IGNORED.get(key, "not weights") for key in entries}
    return _from_torch(path, torch_files.arrays(tensors, path), settings, classes, ignored)


def _read_safetensors(path: Path, ema: bool) -> Weights:
    if ema:
        raise _no_average(path)
    safetensors = _import_safetensors()
    try:
        # The library compares the header with the size of the file before it reads on.
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        settings = json.loads(metadata.get("stvit_config", "null"))
        classes = json.loads(metadata.get("class_names", "null"))
    except Exception as error:  # SafetensorError, and what numpy or json make of foreign content
        raise UserError(f"{path} is damaged, or not a safetensors file: {error}") from error
    return _from_torch(path, state_dict, settings, classes, {})


def _read_directory(path: Path, ema: bool) -> Weights:
    if not (path / "weights").is_dir() or not (path / "meta").is_dir():
        raise UserError(
            f"{path} is neither a directory that convert_torch_weights.py wrote nor the workdir of "
            "a run with checkpoints"
        )
    if ema:
        raise _no_average(path)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            args = ocp.args.Composite(weights=ocp.args.PyTreeRestore(), meta=ocp.args.JsonRestore())
            items = checkpointer.restore(path.absolute(), args=args)
        if items.meta["sha256"] != _digest(items.weights):
            raise ValueError("its values are not those that were written")
    except Exception as error:  # the readers raise anything on damaged files
        raise UserError(f"{path} is damaged, convert again: {one_line(error)}") from error
    meta = items.meta
    return Weights(items.weights, meta["stvit_config"], path, {}, classes=meta.get("class_names"))


def _read_workdir(path: Path, ema: bool) -> Weights:
    """From the newest checkpoint that is sound; nothing is changed in the workdir."""
    try:
        model = json.loads((path / "config.json").read_text())["model"]
        settings = {k: v for k, v in model.items() if k in ("name", *SETTINGS) and v is not None}
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{path / 'config.json'} cannot be read: {one_line(error)}") from error
    collections = tuple(f"ema/{c}" for c in _COLLECTIONS) if ema else _COLLECTIONS

    def select(checkpoint: Path, forms: dict[str, str]) -> dict[str, Any]:
        wanted = [leaf for leaf in forms if leaf.startswith(collections)]
        if not wanted:
            raise _no_average(checkpoint)
        return nested(dict.fromkeys(wanted, 0))

    found = read_newest(path / "checkpoints", select)
    if found is None:
        raise UserError(f"{path} holds no sound checkpoint; train first, or bring back a copy")
    variables = found.state["ema"] if ema else found.state
    source = path / "checkpoints" / str(found.position)
    epoch = found.notes.get("epoch")
    return Weights(variables, settings, source, {}, found.position, epoch, _read_classes(path))


def _read_classes(workdir: Path) -> Any:
    """The class names beside a run's checkpoints; older runs have none."""
    path = workdir / "classes.json"
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error


def _are_names(classes: Any, variables: Any) -> bool:
    count = leaves(variables)["params/head/bias"].size
    return (
        isinstance(classes, list)
        and len(classes) == count
        and all(isinstance(name, str) for name in classes)
    )


def _from_torch(
    path: Path,
    state_dict: Mapping[str, np.ndarray],
    settings: Settings | None,
    classes: Any,
    ignored: dict[str, str],
) -> Weights:
    if all(str(name).startswith("module.") for name in state_dict):  # of DistributedDataParallel
        state_dict = {name.removeprefix("module."): x for name, x in state_dict.items()}
    # Stages and blocks are counted by the largest number: one absurd name must not cost memory.
    if absurd := [name for name in state_dict if re.search(r"\d{3}", str(name))]:
        raise UserError(f"{path}: these are not the weights of an STViT: unexpected: {absurd[0]}")
    try:
        variables = torch_weights.from_torch(state_dict)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if kernels := sum(".fold." in name or ".unfold." in name for name in state_dict):
        ignored["attn.unfold.weights, attn.fold.weights"] = f"{kernels} constant kernels, checked"
    return Weights(variables, settings, path, ignored, classes=classes)


def _canonical(path: Any, array: np.ndarray) -> np.ndarray:
    """Floats of at least 32 bits, counters of 64; exact."""
    if path[-1].key == "count" and np.issubdtype(array.dtype, np.integer):
        return np.asarray(array, np.int64)
    if array.dtype in (np.float16, ml_dtypes.bfloat16):
        return array.astype(np.float32)
    if array.dtype not in (np.float32, np.float64):
        raise UserError(
            f"{path_name(path)} is of {array.dtype}; weights are floating-point numbers"
        )
    return array


def _digest(variables: Any) -> str:
    """sha256 over names, dtypes, shapes and bits of all leaves."""
    total = hashlib.sha256()
    for path, array in sorted(leaves(variables).items()):
        total.update(f"{path} {array.dtype}{array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


def _import_safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise UserError(".safetensors files need: pip install safetensors") from error
    return safetensors


def _no_average(path: Path) -> UserError:
    return UserError(f"{path} holds no moving average; leave ema out")
