"""A network for inference: BatchNorm and all else that is linear, taken into the layers beside it.

    what                                      goes into
    BatchNorm after a downsampling            that convolution
    BatchNorm after the head's projection     that projection
    BatchNorm before the conv-FFN             `fc1`
    layer scale                               `proj` of the attention, `fc2` of the conv-FFN
    residual of a depthwise convolution       its centre tap
    BatchNorm in the head of a segmenter      the convolution before it, which gets a bias

The auxiliary head of a segmenter is for training: it is left out.

In the stem a BatchNorm follows GELU, and zeros are padded after it: a convolution that took in its
shift would add it where the padding is, too. There the statistics become one scale and one shift.
LayerNorm takes its statistics from its input: it stays.

Everything is computed in float64 and rounded once, without products of a BLAS, which round as the
machine at hand does: the processes of a run have to get equal numbers.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stvit_jax.errors import UserError
from stvit_jax.models.layers import EPSILON
from stvit_jax.models.settings import (
    Network,
    absent,
    abstract,
    is_segmenter,
    with_backbone,
    without,
)
from stvit_jax.trees import differences

Arrays = dict[str, Any]


def fold_batch_norm(model: Network, variables: Mapping[str, Any]) -> tuple[Network, Arrays]:
    """The same network with fewer operations, for inference only.

    Its outputs are equal but for rounding: to 1e-5 in float32, 1e-9 in float64. In bfloat16 they
    are as far from the exact ones as before, unless channels have means of several deviations:
    docs/performance.md has numbers.

    Args:
      model: of any settings, a segmenter, too; a folded one is returned as it is, with its
        variables.
      variables: its own, `{"params": ..., "batch_stats": ...}`.

    Returns:
      The folded network, which is called as `model` is, and its variables, `{"params": ...}` of
      `jax.Array`s in the dtype of the parameters. No form of weights holds these: keep the others.

    Raises:
      UserError: these are not the variables of `model` (all differences listed).
    """
    folded = with_backbone(model, folded=True)
    return folded, jax.tree.map(jnp.asarray, folded_variables(model, variables))


def folded_variables(model: Network, variables: Mapping[str, Any]) -> Arrays:
    """The second of `fold_batch_norm`, on the host: of arrays of NumPy."""
    expected = without(abstract(model), absent(variables) if "params" in variables else ())
    if differing := differences(variables, expected):
        raise UserError(f"these are not the variables of this network: {'; '.join(differing)}")
    if model.folded:
        return jax.tree.map(np.asarray, dict(variables))
    dtype = jax.tree.leaves(variables["params"])[0].dtype
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), dict(variables))
    fold = _segmenter if is_segmenter(variables) else _network
    return {"params": jax.tree.map(lambda leaf: leaf.astype(dtype), fold(**exact))}


def fitting(model: Network, variables: Mapping[str, Any]) -> Network:
    """`model`, or it folded: that which has such variables."""
    return with_backbone(model, folded="batch_stats" not in variables)


def _segmenter(params: Arrays, batch_stats: Arrays) -> Arrays:
    head, stats = params["decode_head"], batch_stats["decode_head"]
    head = {
        name: {"conv": _followed_by(module["conv"], *_constants(module["bn"], stats[name]["bn"]))}
        if name in stats
        else module
        for name, module in head.items()
    }
    folded = {name: module for name, module in params.items() if name.startswith("norm_")}
    whole = _network(params["backbone"], batch_stats["backbone"])
    return folded | {"backbone": whole, "decode_head": head}


def _network(params: Arrays, batch_stats: Arrays) -> Arrays:
    folded = dict(params)
    for name in params:
        if name == "patch_embed":
            folded[name] = _stem(params[name], batch_stats[name])
        elif name.startswith("layers_"):
            folded[name] = _stage(params[name], batch_stats[name])
    if "norm" in folded:
        norm = _constants(folded.pop("norm"), batch_stats["norm"])
        folded["proj"] = _followed_by(params["proj"], *norm)
    return folded


def _stem(params: Arrays, stats: Arrays) -> Arrays:
    folded = dict(params)
    for name in stats:
        scale, shift = _constants(params[name], stats[name])
        folded[name] = {"scale": scale, "bias": shift}
    return folded


def _stage(params: Arrays, stats: Arrays) -> Arrays:
    folded = {}
    for name, module in params.items():
        if name == "downsample":
            norm = _constants(module["proj_1"], stats[name]["proj_1"])
            folded[name] = {"proj_0": _followed_by(module["proj_0"], *norm)}
        else:
            folded[name] = _block(module, stats[name])
    return folded


def _block(params: Arrays, stats: Arrays) -> Arrays:
    attention, ffn = params["attn"], params["mlp2"]
    scale, shift = _constants(params["norm2"], stats["norm2"])
    gamma_1, gamma_2 = params.get("gamma_1", np.float64(1)), params.get("gamma_2", np.float64(1))
    return {
        "pos_embed": _with_residual(params["pos_embed"]),
        "norm1": params["norm1"],
        "attn": attention | {"proj": _followed_by(attention["proj"], gamma_1)},
        "mlp2": {
            "fc1": _preceded_by(ffn["fc1"], scale, shift),
            "conv": _with_residual(ffn["conv"]),
            "fc2": _followed_by(ffn["fc2"], gamma_2),
        },
    }


def _constants(norm: Arrays, stats: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift (C,) of a BatchNorm in inference."""
    scale = norm["scale"] / np.sqrt(stats["var"] + EPSILON)
    return scale, norm["bias"] - stats["mean"] * scale


def _followed_by(layer: Arrays, scale: np.ndarray, shift: np.ndarray | float = 0) -> Arrays:
    """A linear layer with what scales and shifts its output channels."""
    return {"kernel": layer["kernel"] * scale, "bias": layer.get("bias", 0) * scale + shift}


def _preceded_by(layer: Arrays, scale: np.ndarray, shift: np.ndarray) -> Arrays:
    """A linear layer (C, O) with what scales and shifts its input channels."""
    kernel = layer["kernel"]
    return {
        "kernel": kernel * scale[:, None],
        "bias": layer["bias"] + np.sum(kernel * shift[:, None], axis=0),
    }


def _with_residual(conv: Arrays) -> Arrays:
    """A depthwise convolution (3, 3, 1, C) with its residual."""
    kernel = conv["kernel"].copy()
    kernel[1, 1] += 1
    return conv | {"kernel": kernel}
