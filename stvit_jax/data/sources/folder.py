"""Class folders under `train/` and `val/`."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from stvit_jax.console import Progress
from stvit_jax.data.sources import Source
from stvit_jax.errors import UserError, reason

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclasses.dataclass(frozen=True)
class FolderSource(Source):
    """A split in class folders; a file's label is the rank of its folder's name.

    Attributes:
      class_names: folder names, sorted.
      root: the folder of the class folders.
      names: file names within their class folders, as bytes, sorted by class and name (one compact
        array: ImageNet's are 40 MB, and every loader process gets a copy).
      labels: int32, by image.
    """

    class_names: tuple[str, ...]
    root: str
    names: np.ndarray
    labels: np.ndarray

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
            raise UserError(f"cannot read {path} ({reason(error)}): restore the file") from error

    def where(self, index: int) -> str:
        folder = self.class_names[self.labels[index]]
        return os.path.join(self.root, folder, os.fsdecode(self.names[index]))


def open_folder(root: Path, *, train: bool) -> FolderSource:
    """As `open_source`."""
    folder, other = (root / "train", root / "val") if train else (root / "val", root / "train")
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist: data.source=folder needs data.dir with class folders under "
            "train/ and val/"
        )
    classes = _subfolders(folder)
    if not classes:
        raise UserError(f"{folder} has no class folders: put one folder of images per class there")
    if other.is_dir() and (different := sorted(set(classes) ^ set(_subfolders(other)))):
        raise UserError(
            f"{folder} and {other} have different classes (only in one: "
            f"{', '.join(different[:3])}): make their class folders the same"
        )
    names: list[bytes] = []
    labels: list[np.ndarray] = []
    progress = Progress(f"listing the images in {folder}", len(classes))
    for label, name in enumerate(classes):
        with os.scandir(folder / name) as entries:
            files = sorted(
                os.fsencode(entry.name)
                for entry in entries
                if os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and entry.is_file()
            )
        if not files:
            raise UserError(
                f"{folder / name} holds no images: put some into it (not into folders inside), or "
                "remove it"
            )
        names += files
        labels.append(np.full(len(files), label, np.int32))
        progress.update(label + 1)
    return FolderSource(tuple(classes), str(folder), np.array(names), np.concatenate(labels))


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())
