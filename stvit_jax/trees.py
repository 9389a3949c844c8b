"""Trees of arrays by the paths of their leaves, as `params/head/kernel`."""

import hashlib
from collections.abc import Mapping
from typing import Any

from stvit_jax.errors import listing, one_line


def leaves(tree: Any) -> dict[str, Any]:
    """Every leaf by its path."""
    import jax

    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def path_name(path: Any) -> str:
    """`params/head/kernel`, of a path as JAX gives it."""
    import jax

    return jax.tree_util.keystr(path, simple=True, separator="/")


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dictionaries whose `leaves` are `flat`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def digest(tree: Any) -> str:
    """SHA-256 of names, forms and values of arrays on the host."""
    sha = hashlib.sha256()
    for path, leaf in sorted(leaves(tree).items()):
        sha.update(f"{path} {leaf.dtype} {leaf.shape} ".encode())
        sha.update(leaf.tobytes())
    return sha.hexdigest()


def differences(theirs: Any, ours: Any) -> list[str]:
    """The missing leaves, the unexpected ones, and the other shapes, a sentence each."""
    theirs, ours = leaves(theirs), leaves(ours)
    missing, unexpected = sorted(ours.keys() - theirs), sorted(theirs.keys() - ours)
    lists = {"missing": missing, "unexpected": unexpected}
    shapes = [
        f"{one_line(path, 100)} has shape {theirs[path].shape} there and {ours[path].shape} here"
        for path in ours
        if path in theirs and theirs[path].shape != ours[path].shape
    ]
    found = [f"{what}: {listing(names)}" for what, names in lists.items() if names]
    return found + ([listing(shapes)] if shapes else [])
