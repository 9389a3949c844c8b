"""The one reader of a run's checkpoints: from the newest to the oldest, every bit verified."""

import dataclasses
import errno
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from stvit_jax import cluster, places
from stvit_jax.checkpoints import files, orbax
from stvit_jax.checkpoints.digests import DamagedError, check, leaf_digests
from stvit_jax.console import warn
from stvit_jax.errors import UserError, listing, reason
from stvit_jax.trees import leaves

PyTree = Any
Select = Callable[[Path, dict[str, str]], PyTree]

# What the system refuses, or has no room for, says nothing about the checkpoint.
_VISIBLE_WITHIN = 15  # seconds
_MOST_TRIED = 100  # of a run's newest checkpoints
_NOT_DAMAGE = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


@dataclasses.dataclass(frozen=True)
class Found:
    """The newest sound checkpoint.

    Attributes:
      position: batches consumed.
      state: what was selected of it, every bit as saved.
      notes: what the run kept with it; a run of an older version kept none.
      damaged: positions of the newer ones, which are not sound.
    """

    position: int
    state: PyTree
    notes: dict[str, Any]
    damaged: list[int]


def positions(directory: Path) -> list[int]:
    """Those of the checkpoints in a directory, newest first.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return [n for n in numbered(directory) if orbax.is_committed(directory / str(n))]
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {reason(error)}") from error


def numbered(directory: Path) -> list[int]:
    """The positions that have a folder, newest first; in a bucket, unfinished ones are among them.

    Raises:
      OSError: it cannot be read.
    """
    try:
        with places.os_errors(directory):
            names = [path.name for path in directory.iterdir()]
    except FileNotFoundError:
        if not places.in_bucket(directory):  # which has no folder without something in it
            raise
        names = []
    return sorted((int(name) for name in names if re.fullmatch("[0-9]+", name)), reverse=True)


def read_newest(directory: Path, select: Select) -> Found | None:
    """Reads the newest checkpoint that verifies; each damaged one is named in one line.

    Args:
      directory: of a run's checkpoints; nothing in it is changed.
      select: (path of a checkpoint, its leaves' forms) to what is wanted of it: a tree with paths
        from the forms, its leaves `jax.ShapeDtypeStruct`s with shardings for arrays on devices, or
        anything else for numpy arrays.

    Returns:
      None where there is no checkpoint.

    Raises:
      UserError: from `select`, of another version of the program, not to be read, or none is sound.
    """
    damaged: list[int] = []
    for position in _agreed_positions(directory):
        fault, read = "", None
        with cluster.together():
            if not cluster.is_first():
                _await(directory / str(position))
            try:
                read = read_at(directory, position, select)
            except DamagedError as error:
                fault = str(error)
        faults = cluster.gather(fault)  # one process is enough
        if read and not any(faults):
            return Found(position, *read, damaged)
        warn(next(filter(None, faults)), everyone=False)
        damaged.append(position)
    if damaged:
        # Starting over is for the user to decide: the files may still be worth something.
        raise UserError(
            f"no checkpoint in {directory} is sound; bring back a copy, or remove that directory "
            "to start from the beginning"
        )
    return None


def _agreed_positions(directory: Path) -> list[int]:
    found: list[int] = []
    with cluster.together():
        if cluster.is_first():
            found = positions(directory)[:_MOST_TRIED]
    return json.loads(cluster.told(json.dumps(found)))


def _await(path: Path) -> None:
    """Waits for what process 0 sees: file systems of networks show what is new a little later.

    Raises:
      UserError: it is not to be seen here.
    """
    deadline = time.monotonic() + _VISIBLE_WITHIN
    while not path.exists():
        if time.monotonic() > deadline:
            raise UserError(f"checkpoint {path} is not to be seen here: share that folder")
        time.sleep(0.5)


def read_at(directory: Path, position: int, select: Select) -> tuple[PyTree, dict[str, Any]]:
    """What is selected of one checkpoint, and its notes.

    Args:
      directory: of a run's checkpoints.
      position: one of `positions`.
      select: as of `read_newest`.

    Raises:
      UserError: from `select`, of another version of the program, or not to be read.
      DamagedError: it is not what was saved; in one line, with its path.
    """
    path = directory / str(position)
    files.check_tree(path)
    try:
        with orbax.quiet():
            return _read(path, position, select)
    except UserError:
        raise
    except Exception as error:  # the readers raise anything on damaged files
        places.reach(path)  # a bucket that does not answer says nothing about it, either
        number = errno.EACCES if _is_closed(path) else orbax.errno_of(error)
        if number in _NOT_DAMAGE:
            raise UserError(f"checkpoint {path} cannot be read: {os.strerror(number)}") from error
        raise DamagedError(f"checkpoint {path} is damaged: {orbax.why(error)}") from error


def _read(path: Path, position: int, select: Select) -> tuple[PyTree, dict[str, Any]]:
    """Raises UserError where it is not what is wanted, anything else where it is damaged."""
    path = places.of(path)  # Orbax takes no relative path
    with orbax.checkpointer() as checkpointer:
        meta = checkpointer.restore(path, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        check(meta, position)
        wanted = select(path, meta["forms"])
        restore_args = jax.tree.map(_restore_args, wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        state = checkpointer.restore(path, args=ocp.args.Composite(state=args)).state
    wide = any(leaf.dtype.itemsize == 8 for leaf in jax.tree.leaves(state))
    with jax.enable_x64(wide or jax.config.jax_enable_x64):
        digests, _ = leaf_digests(jax.tree.map(jnp.asarray, state))
    if digests.keys() != leaves(wanted).keys():
        raise DamagedError("it lacks some of what is listed in it")
    if wrong := [leaf for leaf in digests if digests[leaf] != meta["digests"][leaf]]:
        raise DamagedError(f"the digest of {listing(wrong, 3)} is not the one it was saved with")
    return state, meta.get("notes", {})


def _is_closed(path: Path) -> bool:
    """Whether anything in it may not be read: to Orbax that is not there."""
    if places.in_bucket(path):  # where that is said to whoever asks
        return False
    return not all(os.access(inner, os.R_OK) for inner in (path, *path.rglob("*")))


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return ocp.ArrayRestoreArgs(
            sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
        )
    return ocp.RestoreArgs(restore_type=np.ndarray)
