"""Which of a file's tensors are the network's, and how they are called without what was put round.

People save the weights under many entries, beside moving averages, teachers and optimisers, and
have wrapped the network before: `module.` of DistributedDataParallel, `_orig_mod.` of
torch.compile, `model.` of Lightning, `backbone.` of a detector. The tensors are found by a name
that every STViT has, `patch_embed.proj.0.weight`, whatever stands in front of it. Where there is a
`decode_head` beside a `backbone`, that is no wrapper: they are a segmenter's.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from stvit_jax.errors import UserError, listing, one_line

_FIRST = "patch_embed.proj.0.weight"
_BACKBONE, _HEAD = "backbone.", "decode_head."  # of a segmenter
# Modules that wrap others, anywhere in a name. None of the network's own is called so.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Where there are several sets of weights, the first of these is meant.
_USUAL = ("", "model", "state_dict", "model_state_dict", "backbone", "net", "network", "weights")
_AVERAGES = {"ema", "swa", "avg", "averaged", "average", "shadow"}
_COUNTERS = {  # which tools leave among the tensors, by the last part of the name
    "n_averaged": "a counter of torch.optim.swa_utils",
    "total_ops": "a counter of thop",
    "total_params": "a counter of thop",
}
_KNOWN = {
    "optimizer": "training state",
    "lr_scheduler": "training state",
    "scaler": "training state",
    "epoch": "training state",
    "max_accuracy": "a note of the training",
    "args": "options of the training",
}
_DEPTH = 3  # of entries in entries
_MOST_SETS = 20


@dataclasses.dataclass(frozen=True)
class Found:
    """The network's tensors.

    Attributes:
      tensors: published names to what stands under them.
      ignored: entries and tensors that were left out, and why.
      notes: what was done to the names.
    """

    tensors: dict[Any, Any]
    ignored: dict[str, str]
    notes: tuple[str, ...]


class NoAverageError(Exception):
    """There is no moving average among the sets of weights."""


@dataclasses.dataclass(frozen=True)
class _Set:
    """The weights of one network: in a mapping under entries, behind a prefix."""

    entries: tuple[str, ...]
    prefix: str
    held: Mapping[Any, Any]

    def __str__(self) -> str:
        return one_line(".".join((*self.entries, f"{self.prefix}*")), 100)

    @property
    def is_average(self) -> bool:
        parts = re.split("[^a-z]+", ".".join((*self.entries, self.prefix)).lower())
        return not _AVERAGES.isdisjoint(parts)

    @property
    def rank(self) -> tuple[int, int]:
        return _rank(self.entries[-1] if self.entries else ""), _rank(self.prefix.rstrip("."))


def find(held: Mapping[Any, Any], ema: bool) -> Found:
    """Finds the network's tensors.

    Args:
      held: what a file holds: names to tensors, or entries, one of which is such a mapping.
      ema: the moving average in place of the raw weights.

    Raises:
      NoAverageError: there is none, and it is asked for.
      UserError: nothing tells which of several is meant; the message lacks the file's name.
    """
    sets = list(itertools.islice(_sets(held, (), {}), _MOST_SETS))
    chosen = _choose(sets, ema)
    if chosen is None:  # of some other network: whoever reads the names will say so
        if ema:
            raise NoAverageError
        entry = next((e for e in _USUAL[1:] if e in held), None)
        whole = held if entry is None else held[entry]
        return Found(whole if isinstance(whole, Mapping) else {entry: whole}, {}, ())

    together = [s for s in sets if s.entries == chosen.entries and s is not chosen]
    ignored = _beside(held, chosen, sets, ema)
    ignored |= {str(other): _reason_of(other, ema) for other in together}
    tensors: dict[Any, Any] = {}
    outside, stripped = [], set()
    for name, value in chosen.held.items():
        plain = _unwrapped(name)
        last = str(plain).rpartition(".")[2]
        if last in _COUNTERS:
            ignored[f"*{last}"] = _COUNTERS[last]
        elif not isinstance(plain, str) or _belongs(plain, chosen, together):
            inner = plain.removeprefix(chosen.prefix) if isinstance(plain, str) else plain
            if inner in tensors:
                raise UserError(f"two tensors in it are called {one_line(inner, 100)}")
            tensors[inner] = value
            if name != inner:
                stripped.add(name.removesuffix(inner) if name.endswith(inner) else "wrappers")
        elif not any(_belongs(plain, other, [chosen, *together]) for other in together):
            outside.append(name)
    if outside:
        ignored[f"{len(outside)} tensors outside of {chosen.prefix}"] = listing(outside)
    notes = (f"taken off the names: {listing(sorted(stripped), 3)}",) if stripped else ()
    return Found(tensors, ignored, notes)


def with_counters(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With `num_batches_tracked` of every BatchNorm: 0 where it is missing, as in old files."""
    means = [name.removesuffix("running_mean") for name in state if name.endswith("running_mean")]
    zero = np.zeros((), np.int64)
    return {f"{module}num_batches_tracked": zero for module in means} | dict(state)


def _sets(
    held: Mapping[Any, Any], entries: tuple[str, ...], seen: dict[int, list[str]]
) -> Iterator[_Set]:
    """Every mapping is looked through once, however often it is held."""
    known = id(held) in seen
    if not known:
        plain = [_unwrapped(name) for name in held if isinstance(name, str)]
        prefixes = {name.removesuffix(_FIRST) for name in plain if name.endswith(_FIRST)}
        segmenters = {before for before, head, _ in (n.partition(_HEAD) for n in plain) if head}
        prefixes = {
            p.removesuffix(_BACKBONE) if p.removesuffix(_BACKBONE) in segmenters else p
            for p in prefixes
        }
        seen[id(held)] = sorted(p for p in prefixes if p == "" or p.endswith("."))
    yield from (_Set(entries, prefix, held) for prefix in seen[id(held)])
    if not known and not seen[id(held)] and len(entries) < _DEPTH:
        for key, value in held.items():
            if isinstance(key, str) and isinstance(value, Mapping):
                yield from _sets(value, (*entries, key), seen)


def _choose(sets: list[_Set], ema: bool) -> _Set | None:
    if len(sets) == _MOST_SETS:
        raise UserError(f"it holds {_MOST_SETS} sets of weights; save the one that is meant alone")
    fitting = sorted((s for s in sets if s.is_average == ema), key=lambda s: s.rank)
    if ema and sets and not fitting:
        raise NoAverageError
    if sets and not fitting:
        raise UserError(f"it holds no weights but a moving average, {sets[0]}: take it with ema")
    if len(fitting) > 1 and fitting[0].rank == fitting[1].rank:
        raise UserError(
            f"it holds several sets of weights: {listing(fitting)}; save the one that is meant "
            "alone"
        )
    return fitting[0] if fitting else None


def _beside(held: Mapping[Any, Any], chosen: _Set, sets: list[_Set], ema: bool) -> dict[str, str]:
    """The entries that were passed by on the way to the chosen set, and why."""
    ignored, level = {}, held
    for depth, entry in enumerate(chosen.entries):
        for key in level:
            if key != entry:
                path = (*chosen.entries[:depth], str(getattr(key, "text", key)))
                ignored[one_line(".".join(path), 100)] = _reason(path, sets, ema)
        level = level[entry]
    return ignored


def _belongs(name: str, to: _Set, others: list[_Set]) -> bool:
    """Whether a name is behind the prefix of a set, and not behind a longer one."""
    longer = [o.prefix for o in others if len(o.prefix) > len(to.prefix)]
    return name.startswith(to.prefix) and not name.startswith(tuple(longer))


def _reason(path: tuple[str, ...], sets: list[_Set], ema: bool) -> str:
    inside = [s for s in sets if s.entries[: len(path)] == path]
    return _reason_of(inside[0], ema) if inside else _KNOWN.get(path[-1], "not weights")


def _reason_of(other: _Set, ema: bool) -> str:
    if other.is_average:
        return "another moving average" if ema else "the moving average; taken with ema"
    return "the raw weights; taken without ema" if ema else "another set of weights"


def _rank(name: str) -> int:
    return _USUAL.index(name) if name in _USUAL else len(_USUAL)


def _unwrapped(name: Any) -> Any:
    if not isinstance(name, str):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
