"""The settings of a network: what its variables tell of them, and what has to be stated.

Settings are the published names of what makes the network, and the `name` of the variant they
derive from. `num_heads`, `n_iter` and `stoken_size` leave no trace in names and shapes.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from stvit_jax.errors import UserError
from stvit_jax.models.stvit import VARIANTS, STViT, create_model
from stvit_jax.trees import differences

Settings = dict[str, Any]

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
_OUTLINE = ("embed_dim", "depths")

# For `jax.jit` on CPU, of programs that run once: optimising them takes LLVM longer than it saves.
UNOPTIMIZED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def complete(
    variables: Any, carried: Settings | None, name: str | None = None, **overrides: Any
) -> Settings:
    """All settings: as stated here, or as the file carries them, or by the shapes.

    Args:
      variables: `{"params": ..., "batch_stats": ...}` of an STViT.
      carried: what the file of the variables says, if anything.
      name: of a variant; None: `carried`, or else the variant that has these shapes.
      **overrides: of the variant `name`, by the published names.

    Returns:
      `name` and every one of `SETTINGS`; plain values, as JSON has them.

    Raises:
      UserError: no variant has these shapes, or not the one that was stated (with differences).
    """
    shapes = _shape_settings(variables)
    stated = {"name": name, **overrides} if name else carried
    if stated is None:
        like = [n for n in VARIANTS if all(VARIANTS[n][f] == shapes[f] for f in _OUTLINE)]
        if not like:
            raise UserError(f"no variant has these shapes; {_remedy(shapes)}")
        stated = {"name": like[0]}
    model = create({"num_classes": shapes["num_classes"]} | stated)
    # First the outline: it bounds the size of the network that a file asks for.
    wrong = [
        f"{field} is {shapes[field]} there and {tuple(getattr(model, field))} in {stated['name']}"
        for field in _OUTLINE
        if tuple(getattr(model, field)) != shapes[field]
    ]
    try:
        wrong = wrong or differences(variables, abstract(model))
    except (ArithmeticError, TypeError, ValueError) as error:  # of values that a file carries
        raise UserError(f"the settings {stated} describe no network: {error!r}") from error
    if wrong:
        raise UserError(f"not {stated['name']}: {'; '.join(wrong)}; {_remedy(shapes)}")
    settings = {field: getattr(model, field) for field in SETTINGS}
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    return {"name": stated["name"], **settings}


def create(settings: Settings, **overrides: Any) -> STViT:
    """The network that settings describe; overrides as of `create_model`, `dtype` among them.

    Raises:
      UserError: settings that make no network.
    """
    try:
        fields = {key: value for key, value in settings.items() if key != "name"}
        return create_model(settings["name"], **(fields | overrides))
    except (AttributeError, KeyError, TypeError) as error:  # of values that a file carries
        raise UserError(f"the settings {settings} describe no network: {error!r}") from error


def images(model: STViT) -> jax.ShapeDtypeStruct:
    """An input to initialise with; no leaf depends on its size."""
    return jax.ShapeDtypeStruct((1, 32, 32, model.in_chans), jnp.float32)


def abstract(model: STViT) -> dict[str, Any]:
    """Shapes and dtypes of the variables of a network."""
    return jax.eval_shape(lambda key: model.lazy_init(key, images(model)), jax.random.key(0))


def _shape_settings(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that shapes show."""
    params = variables["params"]
    stages = [
        params[f"layers_{i}"] for i in range(sum(key.startswith("layers_") for key in params))
    ]
    first = [stage["blocks_0"] for stage in stages]
    dims = tuple(block["norm1"]["scale"].shape[0] for block in first)
    return {
        "embed_dim": dims,
        "depths": tuple(sum(key.startswith("blocks_") for key in stage) for stage in stages),
        "layerscale": tuple("gamma_1" in block for block in first),
        "mlp_ratio": first[0]["mlp2"]["fc1"]["bias"].shape[0] / max(dims[0], 1),
        "qkv_bias": "bias" in first[0]["attn"]["qkv"],
        "projection": params["head"]["kernel"].shape[0],
        "num_classes": params["head"]["kernel"].shape[1],
        "in_chans": params["patch_embed"]["proj_0"]["kernel"].shape[2],
    }


def _remedy(shapes: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    known = " ".join(f"--{field}={text(value)}" for field, value in shapes.items())
    return (
        f"say what it is: convert_torch_weights.py ... --model stvit_small {known} and, as it was "
        "trained, what shapes do not show: --num_heads=A,B,... --n_iter=... --stoken_size=..."
    )
