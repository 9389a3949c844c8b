"""Weights in files of every form, in and out.

    form            holds                                    its settings and class names lie in
    x.pth, .pt ...  PyTorch names under `model`              entries beside `model`
    x.safetensors   PyTorch names                            the metadata
    directory       Orbax items `weights` and `meta`         `meta`
    workdir         `checkpoints/STEP`, of a run             `config.json`, `classes.json`

Any of them may lie in a bucket (`gs://`); a file there is fetched before it is read.

Read, not written: a folder with `model.safetensors` or `pytorch_model.bin`, or an index of shards;
`hf_hub:OWNER/NAME[@REVISION]`, see `hub`. Of a `config.json` in such a folder, see `pretrained`,
what it says of STViT counts before what the file of weights says; any other is let alone.

A segmenter's PyTorch names are mmsegmentation's. Shapes show its head and the width of that, so no
config of a run has to say them.

Settings are called `stvit_config`, names by label `class_names`, a list, and the side of the
pictures `image_size`. `settings.py` says what settings are. Files of others carry none; a variant
is recognised by its shapes. A file that is written here holds one set of weights; files of training
hold the moving average besides, which `ema` asks for.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stvit_jax import places, torch_weights
from stvit_jax.checkpoints import (
    directories,
    files,
    hub,
    orbax,
    reader,
    safetensors_files,
    state_dicts,
    torch_files,
)
from stvit_jax.checkpoints.digests import DamagedError
from stvit_jax.errors import UserError, listing, one_line, reason
from stvit_jax.models.settings import SETTINGS, Settings, is_segmenter
from stvit_jax.trees import leaves, nested, path_name

_CARRIED = ("stvit_config", "class_names", "image_size")  # beside the weights
_COLLECTIONS = ("params/", "batch_stats/")
_NARROW = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
LARGEST_IMAGE = 2**14
# Of a folder that holds one set of weights, as hubs have them; the first that is there.
_IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")


@dataclasses.dataclass(frozen=True)
class Weights:
    """What `read` found.

    Attributes:
      variables: `{"params": ..., "batch_stats": ...}`, numpy: float32 or float64, counters int64.
        What follows the stages may be missing: the head, or all of it; of a segmenter, nothing.
      settings: of the network, as the file carries them; None where it carries none.
      source: the file or directory that was read; of a workdir, its checkpoint.
      ignored: entries that were left out, and why.
      step: batches consumed, of a workdir's checkpoint; None otherwise.
      epoch: likewise.
      classes: names by label, where the file carries them.
      notes: what was done to the names and values, in lines.
      image_size: side in pixels of the square pictures that it is for, where the file says it.
    """

    variables: dict[str, Any]
    settings: Settings | None
    source: Path
    ignored: dict[str, str]
    step: int | None = None
    epoch: float | None = None
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    image_size: int | None = None


def read(path: str | Path, ema: bool = False) -> Weights:
    """Reads weights of any form.

    Args:
      path: see the module; `~` stands for the home directory.
      ema: the moving average in place of the raw weights.

    Raises:
      UserError: not there, not of a known form, damaged, no STViT, not finite, or no moving average
        in it.
    """
    path = hub.fetched(str(path)) if hub.is_address(str(path)) else files.located(path)
    places.reach(path)
    try:
        with places.os_errors(path):
            if not path.exists():
                raise UserError(f"there are no weights at {path}")
            weights = _read_directory(path, ema) if path.is_dir() else _read_file(path, ema)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    source = weights.source
    if not isinstance(weights.settings, dict | None):
        kind = type(weights.settings).__name__
        raise UserError(f"{source} is damaged: its stvit_config is no mapping but {kind}")
    if not all(isinstance(weights.variables.get(c[:-1]), dict) for c in _COLLECTIONS):
        raise UserError(f"{source} holds no params and batch_stats of a network")
    try:
        variables = jax.tree_util.tree_map_with_path(_canonical, weights.variables)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    infinite = [name for name, x in leaves(variables).items() if not np.all(np.isfinite(x))]
    if infinite:
        raise UserError(
            f"{source} holds weights that are not finite, in {listing(infinite, 3)}: whatever is "
            "computed with them is not either; take an earlier checkpoint"
        )
    classes, ignored = weights.classes, weights.ignored
    if classes is not None and not _are_names(classes, variables):
        classes, ignored = None, ignored | {"class_names": "not one name for each class"}
    classes = None if classes is None else tuple(classes)
    size = weights.image_size
    if size is not None and not (type(size) is int and 1 <= size <= LARGEST_IMAGE):
        size, ignored = None, ignored | {"image_size": "no side of a picture in pixels"}
    return dataclasses.replace(
        weights, variables=variables, classes=classes, ignored=ignored, image_size=size
    )


def write(path: str | Path, weights: Weights) -> None:
    """Writes weights in the form that the path names; a directory unless it ends in a suffix.

    Args:
      path: of something that is not there yet. One that ends in `/` is a directory in any case.
      weights: whole, with settings, see `fit`.

    Raises:
      UserError: the path exists, is of a form that is not written, or cannot be written, or needs a
        package that is missing; or the weights are of a folded network.
    """
    torch_weights.check_unfolded(weights.variables)
    if hub.is_address(str(path)):
        raise UserError(f"{path}: nothing is written to a hub; write a folder, and upload that")
    as_directory = str(path).endswith("/")
    path = files.located(path)
    places.reach(path)
    carried = {"stvit_config": weights.settings}
    if weights.classes is not None:
        carried["class_names"] = list(weights.classes)
    if weights.image_size is not None:
        carried["image_size"] = weights.image_size
    try:
        if path.exists() or (not places.in_bucket(path) and path.is_symlink()):
            raise UserError(f"{path} exists; remove it, or choose another output")
        if as_directory or not files.suffix(path):
            directories.write(path, weights.variables, carried)
            return
        files.check_output(path)
        headless = weights.settings.get("num_classes") == 0
        state_dict = torch_weights.to_torch(weights.variables, partial=headless)
        with files.replaced(path) as file:
            if files.suffix(path) in files.TORCH_SUFFIXES:
                torch_files.write(file, state_dict, carried)
            else:
                texts = {key: json.dumps(value) for key, value in carried.items()}
                safetensors_files.write(file, state_dict, {"format": "pt"} | texts)
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # what torch and Orbax make of a full disk
        raise UserError(f"{path} cannot be written: {orbax.why(error)}") from error


def _read_file(path: Path, ema: bool) -> Weights:
    """By its contents, which names do not always tell; a broken one by its name."""
    if path.name.endswith(safetensors_files.INDEX):
        return _read_shards(path, ema)
    if places.in_bucket(path):
        with files.fetched(path) as copy:
            try:
                return dataclasses.replace(_read_file(copy, ema), source=path)
            except UserError as error:
                raise UserError(str(error).replace(str(copy), str(path))) from error
    start, suffix = files.beginning(path), files.suffix(path)
    if start.startswith(b"PK\x03\x04"):
        return _read_torch(path, ema)
    if suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path, ema)
    if suffix in files.TORCH_SUFFIXES or start[:1] == b"\x80":
        return _read_torch(path, ema)
    told = files.what_it_is(start)
    raise UserError(
        f"{path}: files of weights end in .pth or .safetensors{'; ' if told else ''}{told}"
    )


def _read_torch(path: Path, ema: bool) -> Weights:
    entries = torch_files.read(path)
    carried = {key: entries.pop(key, None) for key in _CARRIED}
    if isinstance(carried["class_names"], tuple):
        carried["class_names"] = list(carried["class_names"])
    found = _find(path, entries, ema)
    return _from_torch(path, torch_files.arrays(found.tensors, path), found, carried)


def _read_safetensors(path: Path, ema: bool) -> Weights:
    tensors, metadata = safetensors_files.read(path)
    carried = {key: _json(path, metadata, key) for key in _CARRIED}
    found = _find(path, tensors, ema)
    return _from_torch(path, found.tensors, found, carried)


def _read_shards(index: Path, ema: bool) -> Weights:
    if places.in_bucket(index):
        raise UserError(f"{index} is of weights in shards: copy the folder to this machine")
    tensors: dict[str, Any] = {}
    for file, names in safetensors_files.read_shards(index).items():
        shard = index.parent / file
        if files.suffix(shard) == ".safetensors":
            held = safetensors_files.read(shard)[0]
        else:
            held = torch_files.read(shard)
            held = torch_files.arrays({n: held[n] for n in names if n in held}, shard)
        if missing := [name for name in names if name not in held]:
            raise UserError(f"{shard} lacks {listing(missing)}, which {index.name} says it holds")
        tensors |= {name: held[name] for name in names}
    found = _find(index, tensors, ema)
    return _from_torch(index, found.tensors, found, {})


def _read_directory(path: Path, ema: bool) -> Weights:
    if (path / "checkpoints").is_dir():
        return _read_workdir(path, ema, None)
    if path.name == "checkpoints" and (path.parent / "config.json").exists():
        return _read_workdir(path.parent, ema, None)
    whole = path if places.in_bucket(path) else path.resolve()
    if path.name.isdecimal() and whole.parent.name == "checkpoints":
        return _read_workdir(whole.parent.parent, ema, int(path.name))
    for name in (n + end for n in _IN_FOLDERS for end in ("", safetensors_files.INDEX)):
        if (path / name).exists():
            return _configured(_read_file(path / name, ema), path / "config.json")
    if not directories.is_one(path):
        raise UserError(
            f"{path} is neither a directory that convert_torch_weights.py wrote nor the workdir of "
            f"a run with checkpoints, and holds no {' or '.join(_IN_FOLDERS)}"
        )
    if ema:
        raise _no_average(path)
    variables, carried = directories.read(path)
    settings, classes, size = (carried.get(key) for key in _CARRIED)
    return Weights(variables, settings, path, {}, classes=classes, image_size=size)


def _configured(weights: Weights, path: Path) -> Weights:
    """With what `config.json` beside them says, where that is there and of an STViT."""
    config = files.read_json(path) if path.exists() else None
    if not isinstance(config, dict) or "stvit_config" not in config:
        return weights
    fields = {"settings": "stvit_config", "classes": "label_names", "image_size": "image_size"}
    said = {field: config.get(key) for field, key in fields.items()}
    said = {field: value for field, value in said.items() if value is not None}
    return dataclasses.replace(weights, **said)


def _read_workdir(path: Path, ema: bool, position: int | None) -> Weights:
    """From one checkpoint, or the newest that is sound; nothing is changed in the workdir."""
    config = files.read_json(path / "config.json")
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict):
        raise UserError(f"{path / 'config.json'} cannot be read: there is no model in it")
    settings = {k: v for k, v in model.items() if k in ("name", *SETTINGS) and v is not None}
    collections = tuple(f"ema/{c}" for c in _COLLECTIONS) if ema else _COLLECTIONS

    def select(checkpoint: Path, forms: dict[str, str]) -> dict[str, Any]:
        wanted = [leaf for leaf in forms if leaf.startswith(collections)]
        if not wanted:
            raise _no_average(checkpoint)
        return nested(dict.fromkeys(wanted, 0))

    directory = path / "checkpoints"
    if position is not None:
        try:
            found = reader.Found(position, *reader.read_at(directory, position, select), [])
        except DamagedError as error:
            raise UserError(
                f"{error}; give {path}, and the newest that is sound is taken"
            ) from None
    else:
        found = reader.read_newest(directory, select)
    if found is None:
        raise UserError(f"{path} holds no sound checkpoint; train first, or bring back a copy")
    variables = found.state["ema"] if ema else found.state
    source = directory / str(found.position)
    names = path / "classes.json"  # older runs have none
    classes = files.read_json(names) if names.exists() else None
    epoch = found.notes.get("epoch")
    size = config.get("image_size")
    return Weights(variables, settings, source, {}, found.position, epoch, classes, image_size=size)


def _are_names(classes: Any, variables: Any) -> bool:
    module = "decode_head/conv_seg" if is_segmenter(variables) else "head"
    head = leaves(variables).get(f"params/{module}/bias")
    return (
        isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
        and (head is None or len(classes) == head.size)
    )


def _find(path: Path, held: Mapping[Any, Any], ema: bool) -> state_dicts.Found:
    try:
        return state_dicts.find(held, ema)
    except state_dicts.NoAverageError:
        raise _no_average(path) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _from_torch(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    found: state_dicts.Found,
    carried: Mapping[str, Any],
) -> Weights:
    state_dict = state_dicts.with_counters(tensors)
    ignored, notes = dict(found.ignored), found.notes
    try:
        variables = torch_weights.from_torch(state_dict, partial=True)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if kernels := sum(".fold." in name or ".unfold." in name for name in tensors):
        ignored["attn.unfold.weights, attn.fold.weights"] = f"{kernels} constant kernels, checked"
    if counters := len(state_dict) - len(tensors):
        notes += (f"{counters} num_batches_tracked are missing: taken for 0",)
    settings, classes, size = (carried.get(key) for key in _CARRIED)
    return Weights(
        variables, settings, path, ignored, classes=classes, notes=notes, image_size=size
    )


def _canonical(path: Any, array: np.ndarray) -> np.ndarray:
    """Floats of at least 32 bits, counters of 64; exact."""
    if path_name(path).endswith("/count") and np.issubdtype(array.dtype, np.integer):
        return np.asarray(array, np.int64)
    if array.dtype in (np.float32, np.float64):
        return array
    if array.dtype.name in _NARROW:
        return array.astype(np.float32)
    raise UserError(f"{path_name(path)} is of {array.dtype}; weights are floating-point numbers")


def _json(path: Path, metadata: dict[str, str], key: str) -> Any:
    try:
        return json.loads(metadata.get(key, "null"))
    except Exception as error:  # whatever a text that is no JSON leads to
        raise UserError(f"{path} is damaged: its {key} is no JSON: {one_line(error)}") from error


def _no_average(path: Path) -> UserError:
    return UserError(
        f"{path} holds no moving average; leave ema out (of train.py: --config.ema_decay=0 for the "
        "run's own, --config.init_from_ema=False for init_from)"
    )
