"""Classes of segmentation: their names and the colours that pictures show them in.

ADE20K's are in `ade20k_names.txt`, with their source. Other sets list theirs in a `classes.txt`: a
name a line, the first is the class of value 1; empty lines and such that begin with # do not count.
"""

import functools
from collections.abc import Sequence
from importlib import resources

import numpy as np

from stvit_jax.data import files
from stvit_jax.data.annotations import MOST_CLASSES
from stvit_jax.errors import UserError, listing

Classes = tuple[tuple[str, ...], np.ndarray]  # names, and the palette: uint8 (K, 3), RGB


@functools.cache
def ade20k() -> Classes:
    """The 150 classes of ADE20K."""
    text = (resources.files("stvit_jax.data") / "ade20k_names.txt").read_text("utf-8")
    rows = [line.split("\t") for line in _counted(text)]
    colours = [[int(level) for level in colour.split()] for _, colour in rows]
    return tuple(name for name, _ in rows), np.array(colours, np.uint8)


def listed(path: str) -> Classes:
    """Those of a `classes.txt`, in the colours of `palette`.

    Raises:
      UserError: it is missing, empty, no text, names a class twice, or more than a byte has room
        for.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = _counted(file.read())
    except OSError as error:
        raise files.fault(path, error, "list the classes there, a name a line") from error
    except UnicodeDecodeError:
        raise UserError(
            f"{path} is not text in UTF-8: list the classes there, a name a line"
        ) from None
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path} names classes twice ({listing(twice)}): remove one of each")
    if not 1 <= len(names) <= MOST_CLASSES:
        raise UserError(
            f"{path} lists {len(names)} classes: list 1 to {MOST_CLASSES} there, a name a line"
        )
    return tuple(names), palette(len(names))


def of_network(names: Sequence[str] | None, count: int) -> Classes:
    """Those of a network, in the colours that its training data are shown in.

    Args:
      names: by label, as weights carry them; None where they carry none: 150 classes are taken for
        ADE20K's, and others numbered.
      count: of its classes.
    """
    known = ade20k()
    if tuple(names or known[0]) == known[0] and count == len(known[0]):
        return known
    return tuple(names or (f"class {label}" for label in range(count))), palette(count)


def palette(count: int) -> np.ndarray:
    """Colours that differ: those of PASCAL VOC, black first; uint8 (count, 3), RGB.

    The bits of the class's number are dealt out to red, green and blue, the lowest bits to the
    highest of the levels.
    """
    number = np.arange(count)[:, None]
    levels = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        levels |= ((number >> (3 * bit + np.arange(3)) & 1) << (7 - bit)).astype(np.uint8)
    return levels


def _counted(text: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]
