"""Names and layouts of the published PyTorch state dict, both ways, on numpy arrays; no torch.

The tables below pair PyTorch's modules with ours, and every kind of module has a rule for each of
its leaves, so that a tensor has exactly one counterpart. Both directions are bijective, or they
raise with both lists: names that were not expected and names that are missing.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from stvit_jax.errors import UserError, listing


class Rule(NamedTuple):
    """One leaf: PyTorch's suffix, our collection and leaf name, the layout change both ways."""

    torch: str
    collection: str
    leaf: str
    shape: tuple[int | None, ...]  # in PyTorch; None: any size
    from_torch: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


def _same(a: np.ndarray) -> np.ndarray:
    return a


_SCALE = Rule("weight", "params", "scale", (None,), _same, _same)
_BIAS = Rule("bias", "params", "bias", (None,), _same, _same)
_CONV3X3 = (
    Rule(  # (O, I, 3, 3) and (3, 3, I, O); depthwise (C, 1, 3, 3) and (3, 3, 1, C)
        "weight",
        "params",
        "kernel",
        (None, None, 3, 3),
        lambda a: a.transpose(2, 3, 1, 0),
        lambda a: a.transpose(3, 2, 0, 1),
    ),
    _BIAS,
)
_CONV1X1 = (
    Rule(
        "weight",
        "params",
        "kernel",
        (None, None, 1, 1),
        lambda a: a[:, :, 0, 0].T,
        lambda a: a.T[:, :, None, None],
    ),
    _BIAS,
)
_LINEAR = (Rule("weight", "params", "kernel", (None, None), np.transpose, np.transpose), _BIAS)
_LAYER_NORM = (_SCALE, _BIAS)
_BATCH_NORM = (
    _SCALE,
    _BIAS,
    Rule("running_mean", "batch_stats", "mean", (None,), _same, _same),
    Rule("running_var", "batch_stats", "var", (None,), _same, _same),
    Rule(
        "num_batches_tracked",
        "batch_stats",
        "count",
        (),
        _same,
        lambda a: np.asarray(a, np.int64),
    ),
)
_GAMMAS = tuple(
    Rule(name, "params", name, (1, None, 1, 1), np.ravel, lambda a: a.reshape(1, -1, 1, 1))
    for name in ("gamma_1", "gamma_2")
)

# Two constant kernels a block, which the published code keeps in its state dict; no leaf of ours.
_ONE_HOT = np.eye(9).reshape(9, 1, 3, 3)
_FOLD_KERNELS = tuple(
    Rule(name, "", "", (9, 1, 3, 3), _same, _same) for name in ("unfold.weights", "fold.weights")
)

# Module names; `#` is a number. Both in the published order.
_STEM = tuple(
    (f"patch_embed.proj.{i}", f"patch_embed/proj_{i}", _CONV3X3 if i % 3 == 0 else _BATCH_NORM)
    for i in (0, 2, 3, 5, 6, 8, 9, 11)
)
_BLOCK = (
    ("layers.#.blocks.#", "layers_#/blocks_#", _GAMMAS),
    ("layers.#.blocks.#.pos_embed.conv", "layers_#/blocks_#/pos_embed", _CONV3X3),
    ("layers.#.blocks.#.norm1.norm", "layers_#/blocks_#/norm1", _LAYER_NORM),
    ("layers.#.blocks.#.attn", "", _FOLD_KERNELS),
    ("layers.#.blocks.#.attn.stoken_refine.qkv", "layers_#/blocks_#/attn/qkv", _CONV1X1),
    ("layers.#.blocks.#.attn.stoken_refine.proj", "layers_#/blocks_#/attn/proj", _CONV1X1),
    ("layers.#.blocks.#.norm2", "layers_#/blocks_#/norm2", _BATCH_NORM),
    ("layers.#.blocks.#.mlp2.fc1", "layers_#/blocks_#/mlp2/fc1", _CONV1X1),
    ("layers.#.blocks.#.mlp2.fc2", "layers_#/blocks_#/mlp2/fc2", _CONV1X1),
    ("layers.#.blocks.#.mlp2.conv.conv", "layers_#/blocks_#/mlp2/conv", _CONV3X3),
)
_DOWNSAMPLE = (
    ("layers.#.downsample.proj.0", "layers_#/downsample/proj_0", _CONV3X3),
    ("layers.#.downsample.proj.1", "layers_#/downsample/proj_1", _BATCH_NORM),
)
_HEAD = (("proj", "proj", _CONV1X1), ("norm", "norm", _BATCH_NORM), ("head", "head", _LINEAR))


class _Pair(NamedTuple):
    torch: str  # full name, with # for numbers
    ours: str  # collection/module/leaf, likewise
    rule: Rule


def _pairs(modules: tuple) -> list[_Pair]:
    return [
        _Pair(f"{torch}.{rule.torch}", f"{rule.collection}/{ours}/{rule.leaf}", rule)
        for torch, ours, rules in modules
        for rule in rules
    ]


def _pattern(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r"\#", r"(\d+)") + r"\Z")


_TABLE = _pairs(_STEM + _BLOCK + _DOWNSAMPLE + _HEAD)
_BY_TORCH_NAME = [(_pattern(pair.torch), pair) for pair in _TABLE]
_BY_OUR_NAME = [(_pattern(pair.ours), pair) for pair in _TABLE if pair.rule.leaf]


def from_torch(state_dict: Mapping[str, np.ndarray], partial: bool = False) -> dict[str, Any]:
    """Flax variables from a PyTorch state dict.

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
    variables: dict[str, Any] = {}
    for name, array in state_dict.items():
        pair, numbers = _find(name, _BY_TORCH_NAME)
        array, form = np.asarray(array), pair.rule.shape
        if len(array.shape) != len(form) or any(
            size not in (None, s) for size, s in zip(form, array.shape, strict=True)
        ):
            expected = ", ".join("any" if size is None else str(size) for size in form)
            raise UserError(f"{name} has shape {array.shape}; expected ({expected})")
        if pair.rule in _FOLD_KERNELS:
            if not np.array_equal(array, _ONE_HOT):
                raise UserError(f"{name} is not the constant one-hot kernel of STViT")
            continue
        *modules, leaf = _fill(pair.ours, numbers).split("/")
        node = variables
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = np.asarray(pair.rule.from_torch(array), order="C")
    return variables


def to_torch(variables: Mapping[str, Any], partial: bool = False) -> dict[str, np.ndarray]:
    """A PyTorch state dict from Flax variables; the published code loads it with strict=True.

    Args:
      variables: `{"params": ..., "batch_stats": ...}` with array leaves of any dtype (kept).
      partial: what follows the stages may be missing: the head, or all of it.

    Returns:
      Published names to numpy arrays, in the published order, constant kernels included.

    Raises:
      UserError: leaves without a counterpart, or missing ones (both lists).
    """
    check_unfolded(variables)
    state_dict = {}
    for path, leaf in _leaves(variables):
        pair, numbers = _find(path, _BY_OUR_NAME)
        name = _fill(pair.torch, numbers) if pair else path
        state_dict[name] = pair.rule.to_torch(np.asarray(leaf)) if pair else leaf
    expected = _check_names(state_dict, partial)
    dtype = state_dict["patch_embed.proj.0.weight"].dtype
    ordered = {}
    for name in expected:
        array = state_dict.get(name, _ONE_HOT.astype(dtype))  # only constant kernels are absent
        ordered[name] = np.asarray(array, order="C")
    return ordered


def check_unfolded(variables: Mapping[str, Any]) -> None:
    """Raises UserError for variables of `fold_batch_norm`: a part of the network is gone there."""
    if "batch_stats" not in variables:
        raise UserError(
            "there are no batch_stats, as where a network is folded, and no form of weights holds "
            "that: write the variables that fold_batch_norm was given"
        )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _find(name: str, table: list) -> tuple[_Pair | None, tuple[str, ...]]:
    for pattern, pair in table:
        if match := pattern.match(name):
            return pair, match.groups()
    return None, ()


def _fill(template: str, numbers: Iterable[Any]) -> str:
    for number in numbers:
        template = template.replace("#", str(number), 1)
    return template


def _check_names(names: Collection[str], partial: bool = False) -> list[str]:
    """All names that a state dict with these stages and blocks must have, in published order.

    Layer scale (by stage) and the bias of `qkv` may be absent; constant kernels may be, too, when
    a state dict is read. `partial`: and the head, or all that follows the stages.
    """
    depths: dict[int, int] = {}
    for name in names:
        # Three digits are no stage and no block: one absurd name must not cost memory.
        if match := re.match(r"layers\.([0-9]{1,2})\.blocks\.([0-9]{1,2})\.", name):
            stage, block = map(int, match.groups())
            depths[stage] = max(depths.get(stage, 0), block + 1)
    expected = [pair.torch for pair in _pairs(_STEM)]
    stages = max(depths, default=-1) + 1
    for i in range(stages):
        scaled = f"layers.{i}.blocks.0.gamma_1" in names
        for j in range(depths.get(i, 1)):
            rows = _pairs(_BLOCK if scaled else _BLOCK[1:])
            expected += [_fill(pair.torch, (i, j)) for pair in rows]
        if i + 1 < stages:
            expected += [_fill(pair.torch, (i,)) for pair in _pairs(_DOWNSAMPLE)]
    expected += [pair.torch for pair in _pairs(_HEAD)]
    if not any(name.endswith(".qkv.bias") for name in names):
        expected = [name for name in expected if not name.endswith(".qkv.bias")]

    may_miss = tuple(f".attn.{rule.torch}" for rule in _FOLD_KERNELS)
    missing = [n for n in expected if n not in names and not n.endswith(may_miss)]
    if partial and missing in ([p.torch for p in _pairs(rows)] for rows in (_HEAD[-1:], _HEAD)):
        expected, missing = [n for n in expected if n not in missing], []
    wanted = set(expected)
    unexpected = [name for name in names if name not in wanted]
    if missing or unexpected or not depths:
        raise UserError(
            "these are not the weights of an STViT: "
            f"unexpected: {listing(unexpected)}; missing: {listing(missing)}"
        )
    return expected
