"""Class folders under `train/` and `val/`, and the other layouts that people have.

    train/CLASS/..., val/CLASS/...      val may be called valid, validation or test
    train/CLASS/..., or CLASS/...       a tenth is held out to evaluate on
    train/CLASS/..., val/..., a list    `lists` says which ones

The classes are the folders of `train/`, by name, or by number where all names are numbers (as in
ImageNet-V2's folders). Which images are held out, their names decide, so that more images later
change nothing about those that are there.
"""

import dataclasses
import os
import zlib
from typing import Any

import numpy as np

from stvit_jax.console import Progress, say
from stvit_jax.data import files
from stvit_jax.data.sources import Source, lists
from stvit_jax.data.sources.scan import SUFFIXES, LeftOut, class_folders, images
from stvit_jax.errors import UserError, listing, one_line

LAYOUT = "data.source=folder needs data.dir with class folders under train/ and val/"
# What people call the folder to evaluate on, in lower case; the first that is there is taken.
LIKE_VAL = ("val", "valid", "validation", "dev", "eval", "evaluation", "test", "testing")
HELD_OUT = 10  # every how many-th image


@dataclasses.dataclass(frozen=True)
class FolderSource(Source):
    """A split in class folders.

    Attributes:
      class_names: folder names, by label.
      root: the folder of the class folders.
      names: file names within their class folders, as bytes, sorted by class and name (one compact
        array: ImageNet's are 40 MB, and every loader process gets a copy).
      labels: int32, by image.
      flat: whether the images lie in `root` itself.
    """

    class_names: tuple[str, ...]
    root: str
    names: np.ndarray
    labels: np.ndarray
    flat: bool = False

    @property
    def name(self) -> str:
        return self.root

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.where(index)
        try:
            with open(path, "rb") as file:
                return {"image": file.read(), "label": int(self.labels[index])}
        except OSError as error:
            raise files.fault(path, error) from error

    def where(self, index: int) -> str:
        folder = "" if self.flat else self.class_names[self.labels[index]]
        return os.path.join(self.root, folder, os.fsdecode(self.names[index]))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the splits lie.

    Attributes:
      train: the folder of the class folders to train on.
      val: that to evaluate on; None: a part of `train` is held out.
    """

    train: str
    val: str | None


def layout_of(data_dir: str, *, train: bool) -> Layout:
    """The layout of a folder of a user.

    Raises:
      UserError: it has none that is known, or not the split that is asked for.
    """
    there = _folders(data_dir)
    train_root = os.path.join(data_dir, "train")
    like_val = sorted(
        (name for name in there if name.lower() in LIKE_VAL),
        key=lambda name: LIKE_VAL.index(name.lower()),
    )
    val_root = os.path.join(data_dir, like_val[0]) if like_val else None
    if "train" not in there and (train or not like_val):
        if like_val or not _holds_classes(data_dir, there):
            split = "train" if train else "val"
            missing = os.path.join(data_dir, split)
            raise UserError(f"{missing} does not exist {_instead(data_dir, there, train)}")
        train_root = data_dir
    if val_root and like_val[0] != "val":
        more = f" (not on {listing(f'{name}/' for name in like_val[1:])})" if like_val[1:] else ""
        _say_once(f"there is no val/ in {data_dir}: {like_val[0]}/ is evaluated on{more}")
    return Layout(train_root, val_root)


def open_folder(data_dir: str, *, train: bool) -> FolderSource:
    """As `open_source`."""
    layout = layout_of(data_dir, train=train)
    hold_out = layout.val is None
    root = layout.train if train or hold_out else layout.val
    left_out = LeftOut()
    folders = class_folders(root, left_out)
    with_train = os.path.isdir(layout.train)
    classes = _in_order(folders if root == layout.train or not with_train else _of(layout.train))
    flat = root == layout.val and with_train and not set(folders) - {"images"}
    if flat and (lists.find(root) or left_out or folders):
        return _listed(root, classes, left_out)
    if not classes:
        loose = f" (left out: {left_out})" if left_out else ""
        raise UserError(
            f"{root} has no class folders{loose}: put one folder of images per class there"
        )
    if new := sorted(set(folders) - set(classes)):
        raise UserError(
            f"{root} has classes that {layout.train} does not have ({listing(new)}): make their "
            "class folders the same"
        )

    names: list[bytes] = []
    labels: list[np.ndarray] = []
    empty: list[str] = []
    progress = Progress(f"listing the images in {root}", len(classes))
    for label, name in enumerate(classes):
        found = images(root, name, left_out) if name in folders else []
        if hold_out:
            found = _part(name, found, train)
        if not found:
            empty.append(name)
        names += found
        labels.append(np.full(len(found), label, np.int32))
        progress.update(label + 1)
    if train and empty or not names:
        raise _no_images(root, empty, left_out, hold_out and not train)
    if left_out:
        _say_once(f"left out in {root}: {left_out}")
    if hold_out:
        val = os.path.join(data_dir, "val")
        _say_once(f"{val} does not exist: a tenth of {root} is held out to evaluate on")
    if empty:
        where = "the held-out tenth" if hold_out else root
        _say_once(
            f"{where} has no images of {len(empty)} of {len(classes)} classes: {listing(empty)}"
        )
    return FolderSource(tuple(classes), root, np.array(names), np.concatenate(labels))


def _listed(root: str, classes: list[str], left_out: LeftOut) -> FolderSource:
    """A flat folder to evaluate on."""
    if (path := lists.find(root)) is None:
        loose = f" (left out: {left_out})" if left_out else ""
        raise UserError(
            f"{root} has no class folders{loose}, and no list says what its images show: put one "
            f"folder of images per class there, or {os.path.dirname(root)}/val.txt with a line "
            "`path label` for each image"
        )
    rows = lists.read(path, root, classes)
    _say_once(f"{root} has no class folders: {path} says what its {len(rows)} images show")
    labels = np.array([label for _, label in rows], np.int32)
    return FolderSource(tuple(classes), root, np.array([name for name, _ in rows]), labels, True)


def _holds_classes(data_dir: str, there: list[str]) -> bool:
    """Whether a folder is one of class folders itself."""
    if os.path.basename(os.path.abspath(data_dir)) in ("train", "val") or not there:
        return False
    return all(images(data_dir, name, LeftOut()) for name in there)


def _folders(data_dir: str) -> list[str]:
    """Names of the folders in `data.dir`, sorted."""
    if not data_dir:
        raise UserError(f"data.dir is empty: {LAYOUT}")
    if not os.path.lexists(data_dir):
        raise UserError(f"data.dir {data_dir} does not exist: correct it; {LAYOUT}")
    if os.path.isfile(data_dir):
        raise UserError(f"data.dir {data_dir} is a file: {LAYOUT}")
    return sorted(_of(data_dir))


def _of(root: str) -> list[str]:
    return class_folders(root, LeftOut())


def _instead(data_dir: str, there: list[str], train: bool) -> str:
    """What is in place of a missing `train/` or `val/`, and the remedy."""
    found = f"(there: {listing(f'{name}/' for name in there)}): "
    if train:
        like = [name for name in there if name.lower() in ("train", "training")]
    else:
        like = [name for name in there if name.lower() in LIKE_VAL]
    if like:
        return f"{found}rename {like[0]} to {'train' if train else 'val'}; {LAYOUT}"
    above, last = os.path.split(os.path.abspath(data_dir))
    if last in ("train", "val"):
        return f"{found}set data.dir={above}"
    for name in there:
        if os.path.isdir(os.path.join(data_dir, name, "train")):
            return f"{found}set data.dir={os.path.join(data_dir, name)}"
    return found + LAYOUT


def _in_order(names: list[str]) -> list[str]:
    by_name = sorted(names)
    if not all(name.isascii() and name.isdecimal() for name in names):
        return by_name
    by_number = sorted(names, key=lambda name: (int(name), name))
    if by_number != by_name:
        _say_once(
            f"all class folders have numbers for names: their order is that of the numbers "
            f"({', '.join(by_number[:3])}, ..., {by_number[-1]}), not that of the text"
        )
    return by_number


def _part(folder: str, names: list[bytes], train: bool) -> list[bytes]:
    """Those of a class's images that are to be trained on, or those that are held out."""
    held_out = [zlib.crc32(os.fsencode(folder) + b"/" + name) % HELD_OUT == 0 for name in names]
    if all(held_out) and held_out:  # nothing would be left to learn the class from
        held_out[0] = False
    if not any(held_out) and len(held_out) > 1:  # nor to tell by how well it is learned
        held_out[-1] = True
    return [name for name, held in zip(names, held_out, strict=True) if held != train]


def _no_images(root: str, empty: list[str], left_out: LeftOut, held_out: bool) -> UserError:
    if held_out:
        return UserError(
            f"{root} has too few images to hold some out: add images, or put some into val/ beside "
            "it"
        )
    if len(empty) == 1:
        where = f"{os.path.join(root, one_line(*empty))} holds"
    else:
        where = f"{len(empty)} class folders of {root} ({listing(empty)}) hold"
    there = f" (left out: {left_out})" if left_out else ""
    return UserError(
        f"{where} no images{there}: put some into it (not into folders inside), or remove it; "
        f"files count that end in {' '.join(sorted(SUFFIXES))}"
    )


_said: set[str] = set()


def _say_once(line: str) -> None:
    """A line about a folder that is opened to train, and again to evaluate."""
    if line not in _said:
        _said.add(line)
        say(line)
