"""What of a folder counts: class folders, images in them, and an account of what is left out.

Hidden and system files are neither. An image is told by its suffix; a file without suffix, by its
first bytes. Nothing is left out without a word.
"""

import collections
import errno
import os

from stvit_jax.data import files
from stvit_jax.data.signatures import HEAD, image_format
from stvit_jax.errors import listing, one_line

# Of the formats that `decode` reads.
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .avif .jp2 .j2k .jpc"
    " .jpf .jpx".split()
)
SYSTEM = frozenset(
    "__macosx @eadir #recycle @recycle $recycle.bin lost+found thumbs.db ehthumbs.db"
    " desktop.ini".split()
) | {"icon\r", "system volume information"}


class LeftOut:
    """How many of which kinds were left out, and the first of each."""

    def __init__(self) -> None:
        self._count: collections.Counter[str] = collections.Counter()
        self._first: dict[str, str] = {}

    def add(self, kind: str, path: str) -> None:
        """One more of a kind."""
        self._count[kind] += 1
        self._first.setdefault(kind, path)

    def merge(self, other: "LeftOut") -> None:
        """All of another account."""
        self._count.update(other._count)
        self._first = other._first | self._first

    def __bool__(self) -> bool:
        return bool(self._count)

    def __str__(self) -> str:
        parts = [
            f"{count} {kind} ({one_line(self._first[kind], 100)}{', ...' if count > 1 else ''})"
            for kind, count in self._count.most_common()
        ]
        return listing(parts)


def is_hidden(name: str) -> bool:
    """Whether a name is that of a hidden file or folder, or one that systems make by themselves."""
    return name.startswith((".", "~$")) or name.lower() in SYSTEM


def class_folders(root: str, left_out: LeftOut) -> list[str]:
    """Names of the folders in `root`, in no order.

    Raises:
      UserError: it cannot be read.
    """
    found = []
    for entry in _entries(root):
        if is_hidden(entry.name):
            left_out.add("hidden or made by the system", entry.name)
        elif (kind := _kind(entry)) == "folder":
            found.append(entry.name)
        else:
            left_out.add(f"{kind}s beside the class folders", entry.name)
    return found


def images(root: str, folder: str, left_out: LeftOut) -> list[bytes]:
    """Names of the images in a class folder of `root`, sorted.

    Where all that it holds of them is a folder `images/`, as in tiny-imagenet, those in there.

    Raises:
      UserError: it cannot be read.
    """
    deeper = os.path.join(folder, "images")
    if not os.path.isdir(os.path.join(root, deeper)):
        return _images(root, folder, left_out)
    own = LeftOut()
    if found := _images(root, folder, own):
        left_out.merge(own)
        return found
    return [os.path.join(b"images", name) for name in _images(root, deeper, left_out)]


def _images(root: str, folder: str, left_out: LeftOut) -> list[bytes]:
    found = []
    for entry in _entries(os.path.join(root, folder)):
        path = os.path.join(folder, entry.name)
        kind = _kept(entry)
        if kind == "image":
            found.append(os.fsencode(entry.name))
        else:
            left_out.add("folders inside of class folders" if kind == "folder" else kind, path)
    return sorted(found)


def images_below(root: str, left_out: LeftOut) -> list[str]:
    """Paths of the images in a folder and in those inside it, in the order of their names.

    A folder that a link leads to a second time, round in a circle say, is entered once.

    Raises:
      UserError: a folder cannot be read.
    """
    found: list[str] = []
    entered: set[str] = set()

    def enter(folder: str) -> None:
        if (real := os.path.realpath(folder)) in entered:
            return
        entered.add(real)
        for entry in sorted(_entries(folder), key=lambda entry: entry.name):
            kind = _kept(entry)
            if kind == "image":
                found.append(entry.path)
            elif kind == "folder":
                enter(entry.path)
            else:
                left_out.add(kind, os.path.relpath(entry.path, root))

    enter(root)
    return found


def _kept(entry: os.DirEntry) -> str:
    """`image`, `folder`, or else the kind of what is left out, in the plural."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if is_hidden(entry.name):
        return "hidden or made by the system"
    if (kind := _kind(entry)) != "file":
        return kind if kind == "folder" else f"{kind}s"
    if suffix in SUFFIXES or (not suffix and _starts_as_image(entry.path)):
        return "image"
    return f"files of suffix {suffix[:12]}" if suffix else "files without suffix that are no images"


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        os.stat(os.path.join(folder, os.curdir))  # as for its files, the right to search it
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise files.fault(folder, error) from error


def _kind(entry: os.DirEntry) -> str:
    """`file`, `folder`, `broken link` or `special file`, links followed."""
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise files.fault(entry.path, error) from error
    return "broken link" if entry.is_symlink() else "special file"


def _starts_as_image(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return image_format(file.read(HEAD)) is not None
    except OSError as error:
        raise files.fault(path, error) from error
