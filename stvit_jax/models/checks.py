"""What users hand to a network: its settings, taken as meant or refused by name, and its input.

Settings come from Python, from files and from command lines: a whole number may be NumPy's, and the
stages a list or an array. What could mean two things (10.0 classes, "False") is refused.
"""

import math
import numbers
import operator
import reprlib
from collections.abc import Callable, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stvit_jax.errors import UserError, kind_of, one_line
from stvit_jax.models.kernels import Kernels

_DTYPES = ("bfloat16", "float16", "float32", "float64")
_REPR = reprlib.Repr()  # that of lists in lists may be endless
_REPR.maxlevel, _REPR.maxother, _REPR.maxstring = 2, 100, 100


def _whole(value: Any) -> int:
    if isinstance(value, bool | np.bool_):
        raise TypeError
    return operator.index(value)


def _number(value: Any) -> float:
    value = value.item() if getattr(value, "shape", None) == () else value
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise TypeError
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _flag(value: Any) -> bool:
    value = value.item() if getattr(value, "shape", None) == () else value
    if not isinstance(value, bool) and _whole(value) not in (0, 1):
        raise TypeError
    return bool(value)


def _dtype(value: Any) -> np.dtype:
    if value is None or jnp.dtype(value).name not in _DTYPES:
        raise TypeError
    return jnp.dtype(value)


def _kernels(value: Any) -> str | Kernels:
    if not isinstance(value, Kernels) and value not in ("auto", "plain"):
        raise TypeError
    return value


# How a value is converted, which values are accepted, and how that is said.
_Rule = tuple[Callable[[Any], Any], Callable[[Any], bool], str]
_AT_LEAST_1: _Rule = (_whole, lambda value: value >= 1, "a whole number, at least 1")
_FLAG: _Rule = (_flag, lambda value: True, "True or False")
_ONE: dict[str, _Rule] = {
    "mlp_ratio": (_number, lambda value: value > 0, "a number above 0"),
    "qkv_bias": _FLAG,
    "projection": _AT_LEAST_1,
    "init_values": (_number, lambda value: True, "a number"),
    "drop_path_rate": (_number, lambda value: 0 <= value < 1, "a number in [0, 1)"),
    "num_classes": (_whole, lambda value: value >= 0, "a whole number, 0 for no classifier"),
    "features_only": _FLAG,
    "in_chans": _AT_LEAST_1,
    "channels": (_whole, lambda value: value >= 2, "a whole number, at least 2"),
    "dropout": (_number, lambda value: 0 <= value < 1, "a number in [0, 1)"),
    "dtype": (_dtype, lambda value: True, f"one of {', '.join(_DTYPES)}"),
    "freeze_bn": _FLAG,
    "group_size": (_whole, lambda value: value >= 0, "a whole number, 0 for the whole batch"),
    "kernels": (
        _kernels,
        lambda value: True,
        "'auto', 'plain' or stvit_jax.models.kernels.Kernels",
    ),
}
# Any number of whole numbers.
_LISTED: dict[str, _Rule] = {
    "remat": (_whole, lambda value: value >= 0, "the numbers of stages, as (0, 1)")
}
_EACH_STAGE: dict[str, _Rule] = {
    "embed_dim": _AT_LEAST_1,
    "depths": _AT_LEAST_1,
    "num_heads": _AT_LEAST_1,
    "n_iter": _AT_LEAST_1,
    "stoken_size": _AT_LEAST_1,
    "layerscale": _FLAG,
}


def setting(field: str, value: Any) -> Any:
    """The value of one setting, as plain Python has it (a dtype as NumPy has it).

    Args:
      field: a field of `STViT` or `Segmenter`.
      value: what the user gave.

    Raises:
      UserError: names the field, the value and what it must be.
    """
    convert, accepts, words = (_ONE | _LISTED | _EACH_STAGE)[field]
    if field in _EACH_STAGE:
        words += ", for each stage, as (1, 2, 2, 1)" if convert is _whole else " for each stage"
    try:
        if field in _ONE:
            result = convert(value)
            fits = accepts(result)
        else:
            if isinstance(value, str | bytes | Mapping | Set):
                raise TypeError
            result = tuple(map(convert, value))
            fits = (field in _LISTED or len(result) > 0) and all(map(accepts, result))
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise UserError(f"model.{field} is {one_line(_REPR.repr(value))}: it must be {words}")
    return result


def settings_fit(model: Any) -> None:
    """Whether the settings of an `STViT` fit together.

    Raises:
      UserError: names the settings that do not.
    """
    stages = len(model.embed_dim)
    for field in _EACH_STAGE:
        count = len(getattr(model, field))
        if count != stages:
            raise UserError(f"model.{field} has {count} stages, embed_dim has {stages}")
    if beyond := [stage for stage in model.remat if stage >= stages]:
        raise UserError(
            f"remat names stage {beyond[0]}; the network has the stages 0 to {stages - 1}"
        )
    for dim, heads in zip(model.embed_dim, model.num_heads, strict=True):
        if dim % heads:
            raise UserError(f"model.embed_dim {dim} is not divisible by its num_heads {heads}")
    if model.embed_dim[0] % 2:
        raise UserError(f"model.embed_dim starts with {model.embed_dim[0]}; the stem needs it even")
    if int(min(model.embed_dim) * model.mlp_ratio) < 1:
        raise UserError(f"model.mlp_ratio is {model.mlp_ratio}: it leaves the MLP no channel")


def call_fits(model: Any, images: Any, *, train: bool, drop_path_rate: Any) -> None:
    """Whether a call of an `STViT` can succeed, asked from within it; arrays may be traced.

    Raises:
      UserError: says what was given, and what would be right.
    """
    images_fit(images, model.in_chans)
    if train and model.folded:
        raise UserError(
            "a folded network has no BatchNorm to train: train the network and the variables that "
            "fold_batch_norm was given"
        )
    dtype = jnp.dtype(model.dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise UserError(
            f'model.dtype is {dtype}: it needs jax.config.update("jax_enable_x64", True)'
        )
    if isinstance(drop_path_rate, int | float | np.number) and not 0 <= drop_path_rate < 1:
        raise UserError(f"drop_path_rate is {drop_path_rate}: it must be in [0, 1)")
    batch, group = images.shape[0], model.group_size or 1
    if train and (batch == 0 or batch % group):
        raise UserError(
            f"a batch of {batch} images cannot be trained on in groups of {group}; give a multiple "
            "of model.group_size, or group_size=0 for the whole batch"
        )
    if not model.is_initializing():
        _variables_fit(model, train, drop_path_rate)


def images_fit(images: Any, channels: int) -> None:
    """Whether images are what a network of so many `channels` takes; they may be traced.

    Raises:
      UserError: says what they are, and what makes them what the network takes.
    """
    wrong = f"images are {kind_of(images)}; the network takes normalised (B, H, W, {channels})"
    if not isinstance(images, np.ndarray | jax.Array):
        raise UserError(f"{wrong} as a NumPy or JAX array")
    shape = images.shape
    if len(shape) != 4 or shape[-1] != channels:
        raise UserError(wrong + _shape_remedy(shape, channels))
    if 0 in shape[1:3]:
        raise UserError(f"{wrong}: of one pixel or more")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"{wrong} of floats: call stvit_jax.data.normalize(images) first")


def _shape_remedy(shape: tuple[int, ...], channels: int) -> str:
    match shape:
        case (_, _, last) if last == channels:
            return ": add the batch axis, images[None]"
        case (first, _, _) if first == channels:
            return ": move the channels last, add the batch axis, images.transpose(1, 2, 0)[None]"
        case (_, second, _, _) if second == channels:
            return ": move the channels last, images.transpose(0, 2, 3, 1)"
        case (_, _, _, 1):
            return f": repeat the grey channel, images.repeat({channels}, axis=-1)"
        case (_, _, _, 4) if channels == 3:
            return ": leave out the fourth channel, images[..., :3]"
    return ""


def _variables_fit(model: Any, train: bool, drop_path_rate: Any) -> None:
    """Flax finds these as well, but names a layer deep in the network, and no remedy."""
    if model.is_mutable_collection("params"):
        return  # an initialisation by `apply`
    if model.folded:
        _folded_fit(model)
        return
    for collection in ("params", "batch_stats"):
        if not model.has_variable(collection, "patch_embed"):
            raise UserError(
                f"the variables hold no {collection!r} of this network: give "
                "{'params': ..., 'batch_stats': ...}, as init and load_weights return them"
            )
    if not train:
        return
    if not model.is_mutable_collection("batch_stats"):
        raise UserError(
            "train=True updates the running statistics: call "
            "model.apply(..., train=True, mutable=['batch_stats'])"
        )
    drops = not isinstance(drop_path_rate, int | float) or drop_path_rate > 0
    if (
        drops
        and sum(model.depths) > 1
        and not (model.has_rng("dropout") or model.has_rng("params"))
    ):
        raise UserError(
            "train=True with a drop path rate draws random numbers: call "
            "model.apply(..., train=True, rngs={'dropout': key})"
        )


def _folded_fit(model: Any) -> None:
    """All names of folded variables are those of others as well: Flax would compute with either."""
    stage = model.get_variable("params", "layers_0", {})
    if not stage or "norm2" in stage.get("blocks_0", {}):
        raise UserError(
            "the variables are not those of a folded network: give what fold_batch_norm returned "
            "with it, or fold them"
        )
