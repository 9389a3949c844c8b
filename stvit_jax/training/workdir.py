"""The folder of a run: what lies in it beside checkpoints and logs, and how it is written.

`config.json`: the recipe; `classes.json`: what the labels mean; `given.json`: what else training
learns from; `evaluations.json`: what has been evaluated, by step; `best.json`: the best of it,
where its checkpoint is kept. Files are replaced whole: whoever reads one reads all of it.
The folder may be one in a bucket, see `places`.
"""

import contextlib
import json
import os
import secrets
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from stvit_jax import cluster, places
from stvit_jax.console import warn
from stvit_jax.errors import UserError, one_line, reason

CONFIG, CLASSES, EVALUATIONS = "config.json", "classes.json", "evaluations.json"
GIVEN, BEST = "given.json", "best.json"
SHARED_WITHIN = 15  # seconds: file systems of networks show what is new a little later


def make(workdir: Path) -> None:
    """Creates the folder, and sees that files can be written there.

    Raises:
      UserError: they cannot.
    """
    try:
        if places.in_bucket(workdir):
            with places.os_errors(workdir):
                (workdir / ".probe").write_bytes(b"")
                (workdir / ".probe").unlink()
            return
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir) as file:
            file.write(b"\0" * 4096)  # more than a full disk still takes
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"--workdir {workdir} cannot be written: {reason(error)}; make room or permissions "
            "there, or use another one"
        ) from error


def check_shared(workdir: Path) -> None:
    """Sees that all processes mean the same folder; after `make`.

    Raises:
      UserError: one of them does not find there what process 0 has written.
    """
    if not cluster.joined():
        return
    first = cluster.told(f"{secrets.token_hex(8)} {socket.gethostname()}")
    token, _, host = first.partition(" ")
    probe = workdir / f".shared-{token}"
    with cluster.together():
        if cluster.is_first():
            replace(probe, token)
    with cluster.together():
        deadline = time.monotonic() + SHARED_WITHIN
        while read_text(probe) != token:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{workdir} is not the same folder on {socket.gethostname()} as on {host}, "
                    "where process 0 runs: give all processes one that they share, on a file "
                    "system that is mounted everywhere or in a bucket (gs://)"
                )
            time.sleep(0.5)
    if cluster.is_first():
        with contextlib.suppress(OSError), places.os_errors(probe):
            probe.unlink()


def has_checkpoints(workdir: Path) -> bool:
    """Whether a run has saved something there.

    Raises:
      UserError: a bucket does not say.
    """
    try:
        with places.os_errors(workdir):
            return any(path.name.isdecimal() for path in (workdir / "checkpoints").iterdir())
    except OSError as error:
        # That nothing is known of a bucket for a while must not make a run start over there.
        if places.in_bucket(workdir) and not isinstance(error, FileNotFoundError):
            raise UserError(f"{workdir} cannot be read: {reason(error)}; try again") from error
        return False


def read_text(path: Path) -> str | None:
    """The text of a file of the run; None where there is no file.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with places.os_errors(path):
            return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        why = reason(error) if isinstance(error, OSError) else one_line(error)
        raise UserError(
            f"{path} cannot be read ({why}); restore it, or start in another --workdir"
        ) from error


def replace(path: Path, text: str) -> None:
    """Writes a file whole; the one before stays until then.

    Raises:
      UserError: it cannot be written.
    """
    with contextlib.suppress(UserError):  # what cannot be read is replaced, too
        if read_text(path) == text:
            return
    if places.in_bucket(path):
        _put(path, text)
        return
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {reason(error)}; make room or permissions there"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _put(path: Path, text: str) -> None:
    """Of an object that is the whole of it."""
    try:
        with places.os_errors(path):
            path.write_text(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}; see to the bucket") from error


class Evaluations:
    """What has been evaluated, by step: the state that says whether an evaluation is still due."""

    def __init__(self, workdir: Path) -> None:
        """Reads what the run before left; a file that is none of ours counts as nothing."""
        self._path = workdir / EVALUATIONS
        self._by_step: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(ValueError, RecursionError):  # UserError is a ValueError
            content = json.loads(read_text(self._path) or "{}")
            if isinstance(content, dict):
                self._by_step = {
                    k: v for k, v in content.items() if k.isdecimal() and isinstance(v, dict)
                }

    def of(self, step: int) -> dict[str, float] | None:
        """The metrics of a step, if it has been evaluated."""
        return self._by_step.get(str(step))

    def steps(self) -> list[int]:
        """The steps that have been evaluated, in order."""
        return sorted(map(int, self._by_step))

    def forget_after(self, step: int) -> None:
        """What a run that goes on after `step` will do again."""
        self._by_step = {k: v for k, v in self._by_step.items() if int(k) <= step}

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Notes an evaluation; where that fails, it is made again after a restart."""
        self._by_step[str(step)] = metrics
        try:
            if cluster.is_first():
                replace(self._path, json.dumps(self._by_step, indent=1) + "\n")
        except UserError as error:
            warn(f"{error}; the evaluation of step {step} is made again after a restart")
