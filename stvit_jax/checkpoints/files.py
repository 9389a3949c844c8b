"""Files of weights as files: where they may lie, what they are, how they are replaced whole."""

import contextlib
import errno
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from stvit_jax import places
from stvit_jax.console import Progress
from stvit_jax.errors import UserError, described, reason

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".pt.tar")
# Of data that is not written here, so that a name of this kind is no name of a directory.
_FOREIGN_SUFFIXES = (
    *(".7z", ".bz2", ".csv", ".gguf", ".gz", ".h5", ".hdf5", ".json", ".mlmodel", ".msgpack"),
    *(".npy", ".npz", ".onnx", ".pb", ".pickle", ".pkl", ".tar", ".tflite", ".tgz", ".txt"),
    *(".xz", ".yaml", ".yml", ".zip", ".zst", ".keras"),
)
# How contents begin that are no weights, and what is to be said of them.
_BEGINNINGS = {
    rb"version https://git-lfs": "it is a pointer of git-lfs: `git lfs pull` fetches the file",
    rb"\s*(?i:<!doctype|<html|<\?xml)": "it is a web page: download the file again",
    rb"\x1f\x8b": "it is compressed by gzip: unpack it",
    rb"BZh": "it is compressed by bzip2: unpack it",
    rb"\xfd7zXZ": "it is compressed by xz: unpack it",
    rb"\x28\xb5\x2f\xfd": "it is compressed by zstd: unpack it",
    rb"7z\xbc\xaf": "it is a 7z archive: unpack it",
    rb"(?s:.{257}ustar)": "it is a tar archive: unpack it",
    rb"\x89HDF": "it is an HDF5 file, of Keras or PyTables",
    rb"\x93NUMPY": "it is a NumPy array",
    rb"GGUF": "it is a GGUF file",
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF": "it is a picture or a video",
    rb"%PDF": "it is a PDF",
    rb"\s*\{": "it is JSON text",
}


def located(path: str | Path) -> Path:
    """A path on this machine, `~` and all, or in a bucket.

    Raises:
      UserError: it is empty, another address, or of nobody's home.
    """
    if not str(path):
        raise UserError("an empty text names no file and no directory of weights")
    if places.is_address(str(path)):
        return places.of(path)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no such home directory") from error


def suffix(path: Path) -> str:
    """The known suffix of a name, in small letters; empty where there is none."""
    name = path.name.lower()
    known = (".safetensors", *TORCH_SUFFIXES, *_FOREIGN_SUFFIXES)
    return max((s for s in known if name.endswith(s)), key=len, default="")


def check_output(path: Path) -> None:
    """Raises UserError where the name is one of data in a form that is not written here."""
    if suffix(path) in _FOREIGN_SUFFIXES:
        raise UserError(
            f"{path}: {suffix(path)} is not written; end it in .safetensors or "
            f"{', '.join(TORCH_SUFFIXES[:4])} for a file, or in / for a directory"
        )


def beginning(path: Path) -> bytes:
    """The first bytes of a file; a pipe or a device is not even opened.

    Raises:
      UserError: it is no ordinary file, or cannot be read.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
            raise UserError(f"{path} is a {kinds.get(stat.S_IFMT(mode), 'device')}, and no file")
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
      UserError: it is no ordinary file, cannot be read, or is no JSON.
    """
    if not places.in_bucket(path):  # which holds nothing but objects
        beginning(path)
    try:
        with places.os_errors(path):
            content = path.read_bytes()
        return json.loads(content)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    except Exception as error:  # ValueError, RecursionError, whatever a text that is none leads to
        what = described(error)
        raise UserError(f"{path} is damaged, it cannot be read as JSON: {what}") from error


def check_tree(path: Path) -> None:
    """Raises UserError where a directory holds something that is read for ever: pipes, devices."""
    if places.in_bucket(path):
        return
    for inner in path.rglob("*"):
        if inner.exists() and not (inner.is_file() or inner.is_dir()):
            raise UserError(f"{inner} is no file and no directory; {path} is not read")


def what_it_is(start: bytes) -> str:
    """What a file that is no weights may be, by its first bytes; empty where nobody knows."""
    if not start:
        return "it is empty"
    if not start.strip(b"\0"):
        return "it begins with zeros: it was allocated, but never written"
    return next((text for begin, text in _BEGINNINGS.items() if re.match(begin, start)), "")


def make_folder_of(path: Path) -> None:
    """Creates the folder that `path` is to lie in, and those above it.

    Raises:
      OSError: it cannot be created, or a file has its name.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error


@contextlib.contextmanager
def fetched(path: Path) -> Iterator[Path]:
    """A copy on this machine, of the same name, of a file in a bucket; it goes with the block.

    Raises:
      OSError: it cannot be read, or there is no room for it.
    """
    with tempfile.TemporaryDirectory(prefix="stvit_jax-") as folder:
        copy = Path(folder) / path.name
        with places.os_errors(path):
            size = path.stat().length
            progress = Progress(f"fetching {path}", size)
            with path.open("rb") as source, copy.open("wb") as sink:
                while part := source.read(2**22):
                    sink.write(part)
                    progress.update(sink.tell())
        if copy.stat().st_size != size:
            raise OSError(f"{path} was cut off after {copy.stat().st_size} of {size} bytes")
        yield copy


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` when all of it is on the disk, and not before.

    Until then it has a name of its own, which nothing that is there already can stand for. In a
    bucket: a new object, which is put there when all of it is known.
    """
    if places.in_bucket(path):
        with tempfile.NamedTemporaryFile() as file:
            yield file
            file.flush()
            places.put(Path(file.name), path)
        return
    make_folder_of(path)
    unfinished = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(unfinished, flags, 0o666), "wb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
