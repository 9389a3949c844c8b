"""Lists that say what the pictures of one flat folder show.

    val_annotations.txt     of tiny-imagenet, in val/: file, class and box, between tabs
    LOC_val_solution.csv    of ImageNet's competition, beside val/: a table of ids and classes
    val.txt                 beside val/ or in it: `path label` a line, a class or its number

The pictures lie in val/ or in val/images/.
"""

import csv
import os
from collections.abc import Iterator, Sequence

from stvit_jax.data import files
from stvit_jax.errors import UserError, listing, one_line

KNOWN = ("val_annotations.txt", "LOC_val_solution.csv", "val.txt", "validation.txt", "test.txt")


def find(val_root: str) -> str | None:
    """The list that belongs to a folder of pictures, if there is one."""
    for folder in (val_root, os.path.dirname(val_root)):
        for name in KNOWN:
            if os.path.isfile(path := os.path.join(folder, name)):
                return path
    return None


def read(path: str, val_root: str, classes: Sequence[str]) -> list[tuple[bytes, int]]:
    """Pictures and their labels: paths within `val_root`, sorted.

    Args:
      path: of the list.
      val_root: the folder of the pictures.
      classes: names by label.

    Raises:
      UserError: a picture is not there, or a label is no class.
    """
    labels = {name: label for label, name in enumerate(classes)}
    found: dict[bytes, int] = {}
    for number, (name, text) in enumerate(_rows(path), 1):
        label = labels.get(text)
        if label is None and text.isdecimal() and int(text) < len(classes):
            label = int(text)
        if label is None:
            raise UserError(
                f"{path}, entry {number}: {one_line(text, 60)!r} is no class folder of train/ "
                f"({listing(classes, 3)}) and no number of one"
            )
        place = next((p for p in _places(name) if os.path.isfile(os.path.join(val_root, p))), None)
        if place is None:
            raise UserError(
                f"{path}, entry {number}: there is no {one_line(name, 100)} in {val_root}: bring "
                "it back, or take it off the list"
            )
        found[os.fsencode(place)] = label
    if not found:
        raise UserError(f"{path} lists no pictures: write `path label` a line")
    return sorted(found.items())


def _places(name: str) -> Iterator[str]:
    """Where a picture of a list may lie: as it says, without val/, and in images/."""
    bare = os.path.basename(name)
    yield from (name, bare, os.path.join("images", bare))


def _rows(path: str) -> Iterator[tuple[str, str]]:
    """(picture, class or number) of every entry."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            if path.endswith(".csv"):
                for row in csv.DictReader(file):
                    yield f"{row['ImageId']}.JPEG", row["PredictionString"].split()[0]
                return
            for line in filter(str.strip, file):
                # The first two of what tabs divide; else the label is what the last blank divides.
                parts = line.rstrip("\r\n").split("\t")
                name, label = parts[:2] if len(parts) > 1 else line.strip().rsplit(None, 1)
                yield name.strip(), label.strip()
    except OSError as error:
        raise files.fault(path, error) from error
    except (AttributeError, IndexError, KeyError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is no list of pictures and classes ({one_line(error)}): write `path label` a "
            "line"
        ) from None
