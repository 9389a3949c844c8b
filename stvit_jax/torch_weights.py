"""Names and layouts of the published PyTorch state dict, both ways, on numpy arrays; no torch.

The tables below, and those of `torch_heads.py`, pair PyTorch's modules with ours. Both directions
are bijective, or they raise with both lists: names that were not expected and names that are
missing. A segmenter has mmsegmentation's names: `backbone.*`, `decode_head.*` and others.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from stvit_jax import torch_heads
from stvit_jax.errors import UserError, listing, one_line
from stvit_jax.torch_rules import (
    BATCH_NORM,
    CONV1X1,
    CONV3X3,
    FOLD_KERNELS,
    GAMMAS,
    LAYER_NORM,
    LINEAR,
    ONE_HOT,
    Table,
    fill,
    pairs,
    placed,
)

# Module names; `#` is a number. Both in the published order.
_STEM = tuple(
    (f"patch_embed.proj.{i}", f"patch_embed/proj_{i}", CONV3X3 if i % 3 == 0 else BATCH_NORM)
    for i in (0, 2, 3, 5, 6, 8, 9, 11)
)
_BLOCK = (
    ("layers.#.blocks.#", "layers_#/blocks_#", GAMMAS),
    ("layers.#.blocks.#.pos_embed.conv", "layers_#/blocks_#/pos_embed", CONV3X3),
    ("layers.#.blocks.#.norm1.norm", "layers_#/blocks_#/norm1", LAYER_NORM),
    ("layers.#.blocks.#.attn", "", FOLD_KERNELS),
    ("layers.#.blocks.#.attn.stoken_refine.qkv", "layers_#/blocks_#/attn/qkv", CONV1X1),
    ("layers.#.blocks.#.attn.stoken_refine.proj", "layers_#/blocks_#/attn/proj", CONV1X1),
    ("layers.#.blocks.#.norm2", "layers_#/blocks_#/norm2", BATCH_NORM),
    ("layers.#.blocks.#.mlp2.fc1", "layers_#/blocks_#/mlp2/fc1", CONV1X1),
    ("layers.#.blocks.#.mlp2.fc2", "layers_#/blocks_#/mlp2/fc2", CONV1X1),
    ("layers.#.blocks.#.mlp2.conv.conv", "layers_#/blocks_#/mlp2/conv", CONV3X3),
)
_DOWNSAMPLE = (
    ("layers.#.downsample.proj.0", "layers_#/downsample/proj_0", CONV3X3),
    ("layers.#.downsample.proj.1", "layers_#/downsample/proj_1", BATCH_NORM),
)
_HEAD = (("proj", "proj", CONV1X1), ("norm", "norm", BATCH_NORM), ("head", "head", LINEAR))


_STVIT = _STEM + _BLOCK + _DOWNSAMPLE
_TABLE = Table(_STVIT + _HEAD)
_SEGMENTER = Table(
    placed(_STVIT, "backbone.", "backbone/")
    + torch_heads.NORMS
    + tuple(row for rows in torch_heads.SEGMENTERS.values() for row in rows)
)


def from_torch(state_dict: Mapping[str, np.ndarray], partial: bool = False) -> dict[str, Any]:
    """Flax variables from a PyTorch state dict, of the network or of a segmenter.

    Args:
      state_dict: published names to numpy arrays in PyTorch's layouts, any dtype (kept).
      partial: what follows the stages may be missing: the head, or all of it.

    Returns:
      `{"params": ..., "batch_stats": ...}`, nested dictionaries of numpy arrays. The constant fold
      and unfold kernels are checked and left out.

    Raises:
      UserError: unexpected or missing names (both lists), or a tensor of the wrong shape or value.
    """
    _check_names(state_dict, partial)
    table = _SEGMENTER if _is_segmenter(state_dict) else _TABLE
    return table.from_torch(state_dict)


def head_from_torch(kind: str, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Flax variables of one head of `stvit_jax.models.heads`.

    Args:
      kind: "upernet" or "fcn", with mmsegmentation's names relative to the head; or "fpn", with
        the names `neck.*` and `decode_head.*`.
      state_dict: as in `from_torch`; `num_batches_tracked` may be missing, and is 0 then.

    Returns:
      `{"params": ..., "batch_stats": ...}` of that head.

    Raises:
      UserError: another kind, unexpected or missing names (both lists), or a wrong shape.
    """
    if kind not in torch_heads.HEADS:
        raise UserError(f"a head is one of {listing(torch_heads.HEADS)}, not {one_line(kind)}")
    rows = torch_heads.HEADS[kind]
    expected = [pair.torch for pair in pairs(rows)]
    counters = [name for name in expected if name.endswith("num_batches_tracked")]
    state_dict = dict.fromkeys(counters, np.zeros((), np.int64)) | dict(state_dict)
    _compare(state_dict, expected, expected, f"a head of kind {kind!r}")
    return Table(rows).from_torch(state_dict)


def to_torch(variables: Mapping[str, Any], partial: bool = False) -> dict[str, np.ndarray]:
    """A PyTorch state dict from Flax variables, of the network or of a segmenter.

    The published code loads it with strict=True; a segmenter's has mmsegmentation's names.

    Args:
      variables: `{"params": ..., "batch_stats": ...}` with array leaves of any dtype (kept).
      partial: what follows the stages may be missing: the head, or all of it.

    Returns:
      Published names to numpy arrays, in the published order, constant kernels included.

    Raises:
      UserError: leaves without a counterpart, or missing ones (both lists).
    """
    check_unfolded(variables)
    table = _SEGMENTER if "decode_head" in variables["params"] else _TABLE
    state_dict = table.to_torch(variables)
    expected = _check_names(state_dict, partial)
    dtype = state_dict[expected[0]].dtype
    ordered = {}
    for name in expected:
        array = state_dict.get(name, ONE_HOT.astype(dtype))  # only constant kernels are absent
        ordered[name] = np.asarray(array, order="C")
    return ordered


def check_unfolded(variables: Mapping[str, Any]) -> None:
    """Raises UserError for variables of `fold_batch_norm`: a part of the network is gone there."""
    if "batch_stats" not in variables:
        raise UserError(
            "there are no batch_stats, as where a network is folded, and no form of weights holds "
            "that: write the variables that fold_batch_norm was given"
        )


def _is_segmenter(names: Iterable[str]) -> bool:
    return any(name.startswith("decode_head.") for name in names)


def _check_names(names: Collection[str], partial: bool = False) -> list[str]:
    """All names that a state dict with these stages and blocks must have, in published order.

    Layer scale (by stage) and the bias of `qkv` may be absent; constant kernels may be, too, when
    a state dict is read. `partial`: and the head, or all that follows the stages.
    """
    segmenter = _is_segmenter(names)
    prefix = "backbone." if segmenter else ""
    depths: dict[int, int] = {}
    for name in names:
        # Three digits are no stage and no block: one absurd name must not cost memory.
        match = re.match(r"layers\.([0-9]{1,2})\.blocks\.([0-9]{1,2})\.", name[len(prefix) :])
        if match and name.startswith(prefix):
            stage, block = map(int, match.groups())
            depths[stage] = max(depths.get(stage, 0), block + 1)
    expected = [pair.torch for pair in pairs(_STEM)]
    stages = max(depths, default=0) + 1
    for i in range(stages):
        scaled = f"{prefix}layers.{i}.blocks.0.gamma_1" in names
        for j in range(depths.get(i, 1)):
            rows = pairs(_BLOCK if scaled else _BLOCK[1:])
            expected += [fill(pair.torch, (i, j)) for pair in rows]
        if i + 1 < stages:
            expected += [fill(pair.torch, (i,)) for pair in pairs(_DOWNSAMPLE)]
    if segmenter:
        kind = "fpn" if any(name.startswith("neck.") for name in names) else "upernet"
        rows = pairs(torch_heads.NORMS + torch_heads.SEGMENTERS[kind])
        expected = [prefix + name for name in expected] + [pair.torch for pair in rows]
    else:
        expected += [pair.torch for pair in pairs(_HEAD)]
    if not any(name.endswith(".qkv.bias") for name in names):
        expected = [name for name in expected if not name.endswith(".qkv.bias")]

    may_miss = tuple(f".attn.{rule.torch}" for rule in FOLD_KERNELS)
    missing = [n for n in expected if n not in names and not n.endswith(may_miss)]
    if partial and missing in ([p.torch for p in pairs(rows)] for rows in (_HEAD[-1:], _HEAD)):
        expected = [name for name in expected if name not in missing]
    needed = [name for name in expected if not name.endswith(may_miss)]
    _compare(names, needed, expected, "a segmenter with STViT" if segmenter else "an STViT")
    return expected


def _compare(
    names: Collection[str], needed: Iterable[str], expected: Iterable[str], what: str
) -> None:
    """Raises UserError with the names that are missing, and those that are not expected."""
    missing = [name for name in needed if name not in names]
    wanted = set(expected)
    unexpected = [name for name in names if name not in wanted]
    if missing or unexpected:
        raise UserError(
            f"these are not the weights of {what}: "
            f"unexpected: {listing(unexpected)}; missing: {listing(missing)}"
        )
