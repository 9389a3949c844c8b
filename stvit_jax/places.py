"""Where files lie: on this machine, or in a bucket of Google Cloud Storage (`gs://BUCKET/DIR`).

A path in a bucket is an `epath.Path`, and has the methods that it shares with `pathlib.Path`; what
takes one takes the other. Where they differ, the difference is here:

- An object is there whole or not at all, cannot be appended to, and needs no folder made for it.
- Whatever the libraries underneath raise becomes an OSError, as it would be on a disk: `os_errors`.
- Without a network a request is tried for half a minute, and a server that takes it and never
  answers is left after one. `reach` asks before any work is done.

Everybody's requests take the same way, gcsfs, whether TensorFlow is installed or not: Orbax needs
what comes with gcsfs in any case, and TensorFlow knows no emulator. Imported where the first bucket
is named, so that whoever names none needs none of it.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stvit_jax.errors import UserError, described, one_line

PATIENCE = 60.0  # seconds that a bucket has for its first answer, and for any single request
_INSTALL = "pip install gcsfs"


def place(what: str, text: str) -> Path:
    """An absolute path: of this machine, or in a bucket.

    Args:
      what: a flag or field, for the message.
      text: as a user wrote it; `~` stands for the home directory.

    Raises:
      UserError: it is empty, another kind of address, or names no bucket.
    """
    if not text.strip():
        raise UserError(f"{what} is empty: name a folder (is a variable of your shell unset?)")
    try:
        return of(text)
    except UserError as error:
        raise UserError(f"{what} {error}") from None


def of(path: str | Path) -> Path:
    """As `place`, of a path, too; `gs:/b` is what `pathlib` makes of `gs://b`.

    Raises:
      UserError: another kind of address, no bucket in it, or of nobody's home.
    """
    text = str(path)
    if not is_address(text):
        try:
            return Path(path).expanduser().absolute()
        except RuntimeError as error:
            raise UserError(f"{text}: there is no such home directory") from error
    found = re.fullmatch(r"gs:/+([a-z0-9][\w.-]+[a-z0-9])(/.*)?", text)
    if not found:
        raise UserError(
            f"{one_line(text)} is an address, but none of gs://BUCKET/DIR: give that, or a path on "
            "this machine (a mount of other storage is one)"
        )
    return _epath(f"gs://{found[1]}{found[2] or ''}")


def is_address(text: str) -> bool:
    """Whether a text is no path of this machine, but begins with a scheme, as `gs://` does."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text))


def in_bucket(path: Path) -> bool:
    """Whether a path is one in a bucket."""
    return str(path).startswith("gs://")


def reach(path: Path) -> None:
    """Sees that the bucket of a path answers and lets us in; a path on this machine passes.

    Raises:
      UserError: it does not, within `PATIENCE` seconds; with the remedy.
    """
    if not in_bucket(path):
        return
    bucket = re.match("gs://[^/]+", str(path))[0]
    answers: list[Any] = []

    def ask() -> None:
        try:
            try:
                answers.append(next(path.iterdir(), None) or True)  # one request
            except FileNotFoundError:  # the path, or the bucket
                answers.append(_epath(bucket).exists())
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # one that hangs keeps no program
    thread.start()
    thread.join(PATIENCE)
    answer = answers[0] if answers else TimeoutError(f"no answer within {PATIENCE:.0f} s")
    if isinstance(answer, ImportError):
        raise UserError(f"{path}: buckets need gcsfs ({one_line(answer)}): {_INSTALL}") from answer
    if isinstance(answer, Exception):
        remedy = (
            "log in (gcloud auth application-default login), or have your account let into the "
            "bucket"
            if _is_refusal(answer)
            else "is there a network, and does STORAGE_EMULATOR_HOST, where it is set, run?"
        )
        raise UserError(f"{bucket} cannot be reached ({described(answer)}): {remedy}") from answer
    if not answer:
        raise UserError(
            f"there is no bucket {bucket}: mend its name, or create it: "
            f"gcloud storage buckets create {bucket}"
        )


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """What the block does with a path in a bucket fails as on a disk: with an OSError that tells.

    UserError passes, and so does everything where the path is one of this machine.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not in_bucket(path):
            raise
        if isinstance(error, FileNotFoundError):  # without a number, its text is an address
            text = os.strerror(errno.ENOENT)
            raise FileNotFoundError(errno.ENOENT, text, str(path)) from error
        if isinstance(error, OSError):
            raise
        raise OSError(described(error)) from error


def files(path: Path) -> Iterator[Path]:
    """All files below a directory."""
    if not in_bucket(path):
        yield from (inner for inner in path.rglob("*") if inner.is_file())
        return
    for inner in path.iterdir():
        if inner.is_dir():
            yield from files(inner)
        elif inner != path:  # some tools mark a directory by an empty object
            yield inner


def remove_tree(path: Path) -> None:
    """Removes a directory and all in it, as far as that can be done."""
    if in_bucket(path):
        with contextlib.suppress(OSError), os_errors(path):
            path.rmtree()
    else:
        shutil.rmtree(path, ignore_errors=True)


def move_tree(path: Path, target: Path, *, first: str) -> None:
    """Moves a directory to a name that is free; in a bucket that is copies, and the rest after.

    Args:
      path: the directory.
      target: where it goes, on the same disk or in the same bucket.
      first: the file by which a directory is known to be complete. It is removed before others, so
        that a move that was cut off leaves the whole behind, or what nobody takes for it.

    Raises:
      OSError: it cannot be moved.
    """
    if not in_bucket(path):
        path.rename(target)
        return
    with os_errors(path):
        for file in list(files(path)):
            file.copy(target / file.relative_to(path), overwrite=True)
        (path / first).unlink(missing_ok=True)
        path.rmtree()


def put(file: Path, target: Path) -> None:
    """Copies a file of this machine into a bucket.

    Raises:
      OSError: it cannot be written, or has not arrived whole.
    """
    with os_errors(target):
        with file.open("rb") as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 2**22)
        if target.stat().length != file.stat().st_size:
            with contextlib.suppress(Exception):
                target.unlink()
            raise OSError(f"{target} has not arrived whole")


def _epath(text: str) -> Path:
    """Sets, once, how buckets are spoken to; what the environment or the user says comes first."""
    os.environ.setdefault("EPATH_USE_TF", "0")
    try:
        import aiohttp
        import fsspec
        from etils import epath
    except ImportError as error:
        raise UserError(f"{text}: buckets need gcsfs ({one_line(error)}): {_INSTALL}") from error
    timeout = aiohttp.ClientTimeout(total=PATIENCE, sock_connect=10)
    settings = {
        "requests_timeout": timeout,
        # Orbax and other processes write beside us: a listing is worth nothing the next moment.
        "use_listings_cache": False,
    }
    fsspec.config.conf["gcs"] = settings | fsspec.config.conf.get("gcs", {})
    # It logs what it raises as well, and warns of every request where an emulator is asked.
    for name in ("gcsfs", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return epath.Path(text)


def _is_refusal(error: Exception) -> bool:
    """Whether somebody answered, and said that we are not to."""
    if getattr(error, "code", None) in (401, 403) or str(error).startswith("Forbidden"):
        return True
    return type(error).__module__.startswith("google.auth")
