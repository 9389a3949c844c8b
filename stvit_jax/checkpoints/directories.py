"""Directories of weights that Orbax writes: the items `weights` and `meta`, with a digest."""

import glob
import hashlib
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from stvit_jax import places
from stvit_jax.checkpoints import files, orbax
from stvit_jax.errors import UserError
from stvit_jax.trees import leaves


def is_one(path: Path) -> bool:
    """Whether it looks like one."""
    parts = (path / "weights").is_dir() and (path / "meta").is_dir()
    return parts and orbax.is_committed(path)


def read(path: Path) -> tuple[Any, dict[str, Any]]:
    """The variables, as numpy arrays, and what is carried beside them: `stvit_config` at least.

    Raises:
      UserError: it is damaged.
    """
    files.check_tree(path)
    try:
        with orbax.quiet(), orbax.checkpointer() as checkpointer:
            args = ocp.args.Composite(weights=ocp.args.PyTreeRestore(), meta=ocp.args.JsonRestore())
            items = checkpointer.restore(places.of(path), args=args)
        if items.meta["sha256"] != _digest(items.weights):
            raise ValueError("its values are not those that were written")
        return items.weights, {"stvit_config": items.meta["stvit_config"]} | items.meta
    except Exception as error:  # the readers raise anything on damaged files
        raise UserError(f"{path} is damaged, convert again: {orbax.why(error)}") from error


def write(path: Path, variables: Any, carried: dict[str, Any]) -> None:
    """Writes variables, and what JSON takes beside them.

    Raises:
      OSError, RuntimeError, ValueError: what Orbax makes of a place that cannot be written.
    """
    if not places.in_bucket(path):
        files.make_folder_of(path)
    args = ocp.args.Composite(
        weights=ocp.args.PyTreeSave(variables),
        meta=ocp.args.JsonSave(carried | {"sha256": _digest(variables)}),
    )
    try:
        with orbax.quiet(), orbax.checkpointer() as checkpointer:
            checkpointer.save(places.of(path), args=args)
    except BaseException:
        _remove_unfinished(path)
        raise


def _remove_unfinished(path: Path) -> None:
    """What Orbax wrote under another name; its threads may go on writing for a moment."""
    if places.in_bucket(path):  # there it has its own name from the start
        places.remove_tree(path)
        return
    quiet_rounds = 0
    for _ in range(50):
        unfinished = list(path.parent.glob(f"{glob.escape(path.name)}.orbax-checkpoint-tmp*"))
        for directory in unfinished:
            shutil.rmtree(directory, ignore_errors=True)
        quiet_rounds = 0 if unfinished else quiet_rounds + 1
        if quiet_rounds == 3:
            return
        time.sleep(0.1)


def _digest(variables: Any) -> str:
    """sha256 over names, dtypes, shapes and bits of all leaves."""
    total = hashlib.sha256()
    for path, array in sorted(leaves(variables).items()):
        total.update(f"{path} {array.dtype}{array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()
