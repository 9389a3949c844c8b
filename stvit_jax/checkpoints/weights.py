"""Weights in files: `.pth`, `.safetensors`, Orbax directories and workdirs of runs, in and out.

    form            holds                                    its settings lie in
    x.pth           PyTorch names under `model`              `stvit_config`, beside `model`
    x.safetensors   PyTorch names                            `stvit_config`, in the metadata
    directory       Orbax items `weights` and `meta`         `meta`
    workdir         `checkpoints/STEP`, of a run             `config.json`

`settings.py` says what settings are. Files of others carry none; a variant is recognised by its
shapes. A file that is written here holds one set of weights; files of training hold the moving
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
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from stvit_jax import torch_weights
from stvit_jax.checkpoints import torch_files
from stvit_jax.checkpoints.manager import leaf_digests
from stvit_jax.console import say
from stvit_jax.errors import UserError, one_line
from stvit_jax.models.settings import (
    SETTINGS,
    Settings,
    abstract,
    complete,
    create,
    images,
)
from stvit_jax.models.stvit import STViT
from stvit_jax.trees import differences, leaves, nested, path_name

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


@dataclasses.dataclass(frozen=True)
class Weights:
    """What `read` found.

    Attributes:
      variables: `{"params": ..., "batch_stats": ...}`, numpy: float32 or float64, counters int64.
      settings: of the network, as the file carries them; None where it carries none.
      source: the file or directory that was read; of a workdir, its checkpoint.
      ignored: entries that were left out, and why.
    """

    variables: dict[str, Any]
    settings: Settings | None
    source: Path
    ignored: dict[str, str]


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
    variables = jax.tree_util.tree_map_with_path(_normal, weights.variables)
    return dataclasses.replace(weights, variables=variables)


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
    unfinished = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pth":
            torch_files.write(
                unfinished, torch_weights.to_torch(weights.variables), weights.settings
            )
        elif path.suffix == ".safetensors":
            _import_safetensors().numpy.save_file(
                torch_weights.to_torch(weights.variables),
                unfinished,
                {"format": "pt", "stvit_config": json.dumps(weights.settings)},
            )
        else:  # Orbax writes to another place and renames by itself
            meta = {"stvit_config": weights.settings, "sha256": _digest(weights.variables)}
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


def identify(weights: Weights, name: str | None = None, **overrides: Any) -> Weights:
    """Weights with all settings, checked against every shape.

    Args:
      weights: as read.
      name: of a variant; None: settings of the file, or the variant that has these shapes.
      **overrides: of the variant `name`, by the published names.

    Raises:
      UserError: no variant has these shapes, or not the one that was stated (with differences).
    """
    try:
        settings = complete(weights.variables, weights.settings, name, **overrides)
    except UserError as error:
        raise UserError(f"{weights.source}: {error}") from None
    return dataclasses.replace(weights, settings=settings)


def merge(variables: Any, weights: Weights) -> Any:
    """Puts weights into the variables of a network.

    Args:
      variables: `{"params": ..., "batch_stats": ...}`, arrays or `jax.ShapeDtypeStruct`s.
      weights: as read; from any image size.

    Returns:
      The same tree: numpy arrays in the dtypes of `variables`. Where the number of classes
      differs, the head's leaves are those of `variables`, and a line says so.

    Raises:
      UserError: anything else differs (all differences listed).
    """
    ours, theirs = leaves(variables), leaves(weights.variables)
    kept = []
    if has_other_head(variables, weights):
        kept = [path for path in ours if path.startswith("params/head/")]
        classes = [side["params/head/kernel"].shape[-1] for side in (theirs, ours)]
        say(
            f"{weights.source}: its head has {classes[0]} classes, this network {classes[1]}; "
            "the head is re-initialised"
        )
    differing = differences(
        {path: x for path, x in theirs.items() if path not in kept},
        {path: x for path, x in ours.items() if path not in kept},
    )
    if differing:
        raise UserError(f"{weights.source} does not fit this network: {'; '.join(differing)}")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf if path_name(path) in kept else theirs[path_name(path)].astype(leaf.dtype)
        ),
        variables,
    )


def has_other_head(variables: Any, weights: Weights) -> bool:
    """Whether only the number of classes tells the heads apart, so that `merge` keeps ours."""
    ours, theirs = (leaves(v).get("params/head/kernel") for v in (variables, weights.variables))
    return (
        ours is not None
        and theirs is not None
        and ours.shape[:-1] == theirs.shape[:-1]
        and ours.shape[-1] != theirs.shape[-1]
    )


def check_heads(model: STViT, weights: Weights) -> None:
    """Raises UserError where the file was made with other attention heads: shapes do not show it.

    The other settings that shapes do not show, `n_iter` and `stoken_size`, are for users to change.
    """
    theirs = create(weights.settings).num_heads if weights.settings else model.num_heads
    if tuple(theirs) != tuple(model.num_heads):
        raise UserError(
            f"{weights.source} has num_heads {tuple(theirs)}, this network "
            f"{tuple(model.num_heads)}; set model.num_heads to the same"
        )


def load_weights(model: STViT, path: str | Path, ema: bool = False) -> dict[str, Any]:
    """Variables of a network from a file of any form.

    Args:
      model: of any image size and number of classes; a head of another size is initialised anew
        (key 0), and a line says so.
      path: `.pth`, `.safetensors`, a converted directory, or the workdir of a run.
      ema: the moving average in place of the raw weights.

    Returns:
      `{"params": ..., "batch_stats": ...}` of `jax.Array`s.

    Raises:
      UserError: as `read`, or they do not fit the network (all differences listed).
    """
    weights = read(path, ema)
    check_heads(model, weights)
    variables = abstract(model)
    if has_other_head(variables, weights):
        init = jax.jit(lambda key: model.lazy_init(key, images(model))["params"]["head"])
        variables["params"]["head"] = init(jax.random.key(0))
    return jax.tree.map(jnp.asarray, merge(variables, weights))


def _read_pth(path: Path, ema: bool) -> Weights:
    loaded = torch_files.read(path)
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path} holds no state dict but {type(loaded).__name__}")
    entries = dict(loaded) if isinstance(loaded.get("model"), Mapping) else {"model": loaded}
    tensors = entries.pop("model_ema" if ema else "model", None)
    if not isinstance(tensors, Mapping):
        raise _no_average(path)
    settings = entries.pop("stvit_config", None)
    ignored = {str(key): _IGNORED.get(key, "not weights") for key in entries}
    return _from_torch(path, torch_files.arrays(tensors, path), settings, ignored)


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
    except Exception as error:  # SafetensorError, and what numpy or json make of foreign content
        raise UserError(f"{path} is damaged, or not a safetensors file: {error}") from error
    return _from_torch(path, state_dict, settings, {})


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
    return Weights(items.weights, items.meta["stvit_config"], path, {})


def _read_workdir(path: Path, ema: bool) -> Weights:
    """From the newest checkpoint that is sound; nothing is changed in the workdir."""
    try:
        model = json.loads((path / "config.json").read_text())["model"]
        settings = {k: v for k, v in model.items() if k in ("name", *SETTINGS) and v is not None}
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{path / 'config.json'} cannot be read: {one_line(error)}") from error
    steps = [p for p in (path / "checkpoints").iterdir() if p.name.isdecimal()]
    for step in sorted(steps, key=lambda p: int(p.name), reverse=True):
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                args = ocp.args.Composite(meta=ocp.args.JsonRestore())
                meta = checkpointer.restore(step.absolute(), args=args).meta
                collections = ("params", "batch_stats")
                names = [f"ema/{c}" for c in collections] if ema else collections
                digests = {k: v for k, v in meta["digests"].items() if k.startswith(tuple(names))}
                if not digests:
                    raise _no_average(step)
                wanted = nested(dict.fromkeys(digests, 0))
                as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
                args = ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True)
                args = ocp.args.Composite(state=args)
                state = checkpointer.restore(step.absolute(), args=args).state
            wide = any(x.dtype.itemsize == 8 for x in jax.tree.leaves(state))
            with jax.enable_x64(wide or jax.config.jax_enable_x64):
                if leaf_digests(jax.tree.map(jnp.asarray, state))[0] != digests:
                    raise ValueError("its digests are not those it was saved with")
        except UserError:
            raise
        except Exception as error:  # the readers raise anything on damaged files
            logging.warning("checkpoint %s is damaged: %s", step, one_line(error))
        else:
            return Weights(state["ema"] if ema else state, settings, step, {})
    raise UserError(f"{path} holds no sound checkpoint; train first, or bring back a copy")


def _from_torch(
    path: Path,
    state_dict: Mapping[str, np.ndarray],
    settings: Settings | None,
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
    return Weights(variables, settings, path, ignored)


def _normal(path: Any, array: np.ndarray) -> np.ndarray:
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
