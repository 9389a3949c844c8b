"""Names and layouts of PyTorch's modules, and how a table of them is read; on numpy arrays.

A table pairs PyTorch's modules with ours, and every kind of module has a rule for each of its
leaves, so that a tensor has exactly one counterpart.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from stvit_jax.errors import UserError


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


SCALE = Rule("weight", "params", "scale", (None,), _same, _same)
BIAS = Rule("bias", "params", "bias", (None,), _same, _same)
CONV3X3 = (
    Rule(  # (O, I, 3, 3) and (3, 3, I, O); depthwise (C, 1, 3, 3) and (3, 3, 1, C)
        "weight",
        "params",
        "kernel",
        (None, None, 3, 3),
        lambda a: a.transpose(2, 3, 1, 0),
        lambda a: a.transpose(3, 2, 0, 1),
    ),
    BIAS,
)
CONV1X1 = (
    Rule(
        "weight",
        "params",
        "kernel",
        (None, None, 1, 1),
        lambda a: a[:, :, 0, 0].T,
        lambda a: a.T[:, :, None, None],
    ),
    BIAS,
)
LINEAR = (Rule("weight", "params", "kernel", (None, None), np.transpose, np.transpose), BIAS)
LAYER_NORM = (SCALE, BIAS)
BATCH_NORM = (
    SCALE,
    BIAS,
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
GAMMAS = tuple(
    Rule(name, "params", name, (1, None, 1, 1), np.ravel, lambda a: a.reshape(1, -1, 1, 1))
    for name in ("gamma_1", "gamma_2")
)

# Two constant kernels a block, which the published code keeps in its state dict; no leaf of ours.
ONE_HOT = np.eye(9).reshape(9, 1, 3, 3)
FOLD_KERNELS = tuple(
    Rule(name, "", "", (9, 1, 3, 3), _same, _same) for name in ("unfold.weights", "fold.weights")
)


class Pair(NamedTuple):
    """A tensor and its leaf."""

    torch: str  # full name, with # for numbers
    ours: str  # collection/module/leaf, likewise
    rule: Rule


Rows = tuple[tuple[str, str, tuple[Rule, ...]], ...]  # PyTorch's module, ours, the rules


def pairs(rows: Rows) -> list[Pair]:
    """Every tensor of some modules, in their order."""
    return [
        Pair(f"{torch}.{rule.torch}", f"{rule.collection}/{ours}/{rule.leaf}", rule)
        for torch, ours, rules in rows
        for rule in rules
    ]


def placed(rows: Rows, torch: str, ours: str) -> Rows:
    """The same modules within another: behind a prefix there, and behind one here."""
    return tuple((torch + theirs, ours + name, rules) for theirs, name, rules in rows)


def fill(template: str, numbers: Iterable[Any]) -> str:
    """A name with its numbers."""
    for number in numbers:
        template = template.replace("#", str(number), 1)
    return template


class Table:
    """Rows, and names looked up in them from both sides."""

    def __init__(self, rows: Rows) -> None:
        found = pairs(rows)
        self._by_torch = [(_pattern(pair.torch), pair) for pair in found]
        self._by_ours = [(_pattern(pair.ours), pair) for pair in found if pair.rule.leaf]

    def from_torch(self, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Nested dictionaries of arrays, of names that all are in the table.

        Raises:
          UserError: a tensor of the wrong shape, or a constant of another value.
        """
        variables: dict[str, Any] = {}
        for name, array in state_dict.items():
            pair, numbers = _find(name, self._by_torch)
            array, form = np.asarray(array), pair.rule.shape
            if len(array.shape) != len(form) or any(
                size not in (None, s) for size, s in zip(form, array.shape, strict=True)
            ):
                expected = ", ".join("any" if size is None else str(size) for size in form)
                raise UserError(f"{name} has shape {array.shape}; expected ({expected})")
            if pair.rule in FOLD_KERNELS:
                if not np.array_equal(array, ONE_HOT):
                    raise UserError(f"{name} is not the constant one-hot kernel of STViT")
                continue
            *modules, leaf = fill(pair.ours, numbers).split("/")
            node = variables
            for module in modules:
                node = node.setdefault(module, {})
            node[leaf] = np.asarray(pair.rule.from_torch(array), order="C")
        return variables

    def to_torch(self, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """PyTorch's names and layouts; a leaf that has no counterpart keeps its path."""
        state_dict = {}
        for path, leaf in _leaves(variables):
            pair, numbers = _find(path, self._by_ours)
            name = fill(pair.torch, numbers) if pair else path
            state_dict[name] = pair.rule.to_torch(np.asarray(leaf)) if pair else leaf
        return state_dict


def _pattern(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r"\#", r"(\d+)") + r"\Z")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _find(name: str, table: list) -> tuple[Pair | None, tuple[str, ...]]:
    for pattern, pair in table:
        if match := pattern.match(name):
            return pair, match.groups()
    return None, ()
