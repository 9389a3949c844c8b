"""The settings of a network: what its variables tell of them, and what has to be stated.

Settings are the published names of what makes the network, and the `name` of the variant they
derive from. `num_heads`, `n_iter` and `stoken_size` leave no trace in names and shapes. Those of a
segmenter are its backbone's, its `head` and the `channels` of that; `num_classes` is its own.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from stvit_jax.errors import UserError, listing, one_line
from stvit_jax.models.segmenter import Segmenter, create_segmenter
from stvit_jax.models.stvit import VARIANTS, STViT, create_model
from stvit_jax.trees import differences

Settings = dict[str, Any]
Network = STViT | Segmenter

SETTINGS = (
    "embed_dim",
    "depths",
    "num_heads",
    "n_iter",
    "stoken_size",
    "mlp_ratio",
    "qkv_bias",
    "projection",
    "layerscale",
    "num_classes",
    "in_chans",
)
HEAD_SETTINGS = ("head", "channels")  # of a segmenter, besides
_OUTLINE = ("embed_dim", "depths")

_STAGES = 16
# The largest number that is a setting. Files carry settings, and what they say is done as often, or
# made as large, as they say.
_LARGEST = {
    "embed_dim": 2**16,
    "depths": 99,
    "num_heads": 2**12,
    "n_iter": 99,
    "stoken_size": 2**10,
    "mlp_ratio": 64,
    "projection": 2**20,
    "num_classes": 2**24,
    "in_chans": 2**12,
    "channels": 2**16,
}
# What follows the stages, and may be missing where only the backbone was saved.
TAIL = ("proj", "norm", "head")
# What a segmenter has besides its backbone.
HEADS = ("decode_head", "auxiliary_head")
AROUND = (*(f"norm_{i}" for i in range(4)), *HEADS)

# For `jax.jit` on CPU, of programs that run once: optimising them takes LLVM longer than it saves.
UNOPTIMIZED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def complete(
    variables: Any, carried: Settings | None, name: str | None = None, **overrides: Any
) -> Settings:
    """All settings: as stated here, or as the file carries them, or by the shapes.

    Args:
      variables: `{"params": ..., "batch_stats": ...}` of an STViT, or of a segmenter with one.
      carried: what the file of the variables says, if anything.
      name: of a variant; None: `carried`, or else the variant that has these shapes.
      **overrides: of the variant `name`, by the published names.

    Returns:
      `name` and every one of `SETTINGS`, of a segmenter `HEAD_SETTINGS`, too; plain values, as JSON
      has them.

    Raises:
      UserError: no variant has these shapes, or not the one that was stated (with differences).
    """
    try:
        shapes = _shape_settings(variables)
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # of another network
        held = listing(variables["params"])
        raise UserError(f"these are not the weights of an STViT: they are of {held}") from error
    if (stages := len(shapes["depths"])) > _STAGES:
        raise UserError(f"it has {stages} stages, more than any STViT")
    stated = {"name": name, **overrides} if name else carried
    if stated is None:
        like = [n for n in VARIANTS if all(VARIANTS[n][f] == shapes[f] for f in _OUTLINE)]
        if not like:
            raise UserError(f"no variant has these shapes; {_remedy(shapes)}")
        stated = {"name": like[0]}
    told = {k: shapes[k] for k in ("num_classes", *HEAD_SETTINGS) if k in shapes}
    model = create(told | stated)
    made = of(model, stated["name"])
    made |= {field: tuple(made[field]) for field in _OUTLINE}
    # First the outline: it bounds the size of the network that a file asks for.
    wrong = [
        f"{field} is {shapes.get(field)} there and {made.get(field)} in {stated['name']}"
        for field in (*_OUTLINE, *HEAD_SETTINGS)
        if made.get(field) != shapes.get(field)
    ]
    try:
        wrong = wrong or differences(variables, without(abstract(model), absent(variables)))
    except (ArithmeticError, TypeError, ValueError) as error:  # of values that a file carries
        raise UserError(f"the settings describe no network: {one_line(error)}") from error
    if wrong:
        raise UserError(f"not {stated['name']}: {'; '.join(wrong)}; {_remedy(shapes)}")
    return of(model, stated["name"])


def of(model: Network, name: str) -> Settings:
    """The settings of a network that derives from the variant `name`; plain values."""
    settings = {field: getattr(backbone(model), field) for field in SETTINGS}
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    if isinstance(model, Segmenter):
        settings |= {"num_classes": model.num_classes}
        settings |= {"head": model.kind, "channels": model.channels}
    return {"name": name, **settings}


def described(settings: Settings) -> str:
    """What a network is called, in words: the variant and, of a segmenter, the head."""
    head, channels = (settings.get(field) for field in HEAD_SETTINGS)
    return f"{head} of {channels} channels on {settings['name']}" if head else settings["name"]


def backbone(model: Network) -> STViT:
    """The STViT that a network is, or has."""
    return model.backbone if isinstance(model, Segmenter) else model


def with_backbone(model: Network, **fields: Any) -> Network:
    """The network with other fields of its STViT."""
    changed = backbone(model).clone(**fields)
    return model.clone(backbone=changed) if isinstance(model, Segmenter) else changed


def is_segmenter(variables: Mapping[str, Any]) -> bool:
    """Whether a tree of variables is of a segmenter."""
    return HEADS[0] in variables["params"]


def absent(variables: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules after the stages that a tree of variables lacks."""
    return tuple(module for module in TAIL if module not in variables["params"])


def without(variables: Mapping[str, Any], modules: tuple[str, ...]) -> dict[str, Any]:
    """Variables without some of the modules at the top."""
    return {
        collection: {module: x for module, x in tree.items() if module not in modules}
        for collection, tree in variables.items()
    }


def create(settings: Settings, **overrides: Any) -> Network:
    """The network that settings describe; overrides as of `create_model`, `dtype` among them.

    It is a segmenter where they have a `head`, unless `features_only` leaves that out.

    Raises:
      UserError: settings that make no network.
    """
    _check(settings)
    try:
        fields = {key: value for key, value in settings.items() if key != "name"} | overrides
        if "head" in fields and not fields.get("features_only"):
            return create_segmenter(fields.pop("head"), settings["name"], **fields)
        fields = {key: value for key, value in fields.items() if key not in HEAD_SETTINGS}
        return create_model(settings["name"], **fields)
    except (AttributeError, KeyError, TypeError) as error:  # of values that a file carries
        raise UserError(f"the settings describe no network: {one_line(repr(error))}") from error


def images(model: Network) -> jax.ShapeDtypeStruct:
    """An input to initialise with; no leaf depends on its size."""
    return jax.ShapeDtypeStruct((1, 32, 32, backbone(model).in_chans), jnp.float32)


def abstract(model: Network) -> dict[str, Any]:
    """Shapes and dtypes of the variables of a network."""
    stages = len(backbone(model).n_iter)
    once = with_backbone(model, n_iter=(1,) * stages)  # no variable depends on it, tracing does
    return jax.eval_shape(lambda key: once.lazy_init(key, images(model)), jax.random.key(0))


def _check(settings: Any) -> None:
    """Raises UserError unless these are names with values of the kinds and sizes of settings.

    Nothing is printed or computed with before that is known: in a file a list may hold itself, and
    a number have a million digits.
    """
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise UserError(f"its settings are {type(settings).__name__}, and no names with values")
    if not isinstance(settings.get("name"), str):
        raise UserError("its settings do not name the variant that they derive from")
    for field, value in settings.items():
        values = value if isinstance(value, list | tuple) else [value]
        plain = all(type(v) in (int, float, bool, str) for v in values[: _STAGES + 1])
        if len(values) > _STAGES or not plain:
            raise UserError(
                f"the settings describe no network: {one_line(field, 50)} is no number, truth "
                f"value or text, and no list of up to {_STAGES}"
            )
        largest = _LARGEST.get(field, 2**24)
        for number in values:
            if isinstance(number, int | float) and not 0 <= number <= largest:
                raise UserError(
                    f"the settings describe no network: {one_line(field, 50)} lies outside of 0 to "
                    f"{largest}"
                )


def _shape_settings(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that shapes show; less where what follows the stages is missing."""
    params = variables["params"]
    head = params.get(HEADS[0])
    if head is not None:
        params = params["backbone"]
    stages = [
        params[f"layers_{i}"] for i in range(sum(key.startswith("layers_") for key in params))
    ]
    first = [stage["blocks_0"] for stage in stages]
    dims = tuple(block["norm1"]["scale"].shape[0] for block in first)
    shown = {
        "embed_dim": dims,
        "depths": tuple(sum(key.startswith("blocks_") for key in stage) for stage in stages),
        "layerscale": tuple("gamma_1" in block for block in first),
        "mlp_ratio": first[0]["mlp2"]["fc1"]["bias"].shape[0] / max(dims[0], 1),
        "qkv_bias": "bias" in first[0]["attn"]["qkv"],
        "in_chans": params["patch_embed"]["proj_0"]["kernel"].shape[2],
    }
    if "proj" in params:
        shown["projection"] = params["proj"]["kernel"].shape[1]
    if "head" in params:
        shown["num_classes"] = params["head"]["kernel"].shape[1]
    if head is not None:
        shape = head["conv_seg"]["kernel"].shape
        shown |= {"head": "fpn" if "neck" in head else "upernet", "channels": shape[0]}
        shown["num_classes"] = shape[1]
    return shown


def _remedy(shapes: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    known = " ".join(f"--{field}={text(value)}" for field, value in shapes.items())
    return (
        f"say what it is: convert_torch_weights.py ... --model stvit_small {known} and, as it was "
        "trained, what shapes do not show: --num_heads=A,B,... --n_iter=... --stoken_size=..."
    )
