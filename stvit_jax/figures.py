"""Figures for files: no window, no state between them."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stvit_jax import places
from stvit_jax.errors import UserError, one_line, reason

FORMS = (".png", ".pdf", ".svg")
LEAST = 256  # pixels of the longer side of a picture beside a legend
LINE = 18  # pixels, of a legend


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure.

    Args:
      width: in inches.
      height: likewise.
    """
    from matplotlib.figure import Figure  # takes a second

    return Figure((width, height), layout="constrained")


def words(text: str, longest: int) -> str:
    """A name as a figure shows it: one line of at most so many characters, no formula."""
    return one_line(text, longest).replace("$", r"\$")


def overlay(image: np.ndarray, labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """A picture under the colours of its classes.

    Args:
      image: uint8 (H, W, 3), RGB.
      labels: integers (H, W); what is no row of the palette stays without colour.
      palette: uint8 (K, 3), RGB.

    Returns:
      uint8 (H, W, 3).
    """
    labelled = labels < len(palette)
    colours = palette[np.where(labelled, labels, 0)]
    mixed = (image.astype(np.uint16) + colours) // 2
    return np.where(labelled[..., None], mixed, image).astype(np.uint8)


def with_legend(picture: np.ndarray, rows: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """A picture and, right of it, what its colours mean; a small one has its pixels repeated.

    Args:
      picture: uint8 (H, W, 3), RGB.
      rows: of text and its colour, from top to bottom.

    Returns:
      uint8 (H', W', 3), the picture at the left and top.
    """
    factor = max(1, LEAST // max(picture.shape[:2]))
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = picture.shape[:2]
    font = ImageFont.load_default(LINE - 5)
    longest = max((int(font.getlength(text)) for text, _ in rows), default=0)
    size = width + longest + 3 * LINE, max(height, LINE * (len(rows) + 1))
    sheet = Image.new("RGB", size, "white")
    sheet.paste(Image.fromarray(picture))
    draw = ImageDraw.Draw(sheet)
    for number, (text, colour) in enumerate(rows):
        left, top = width + LINE // 2, LINE // 2 + number * LINE
        box = left, top + 2, left + LINE, top + LINE - 3
        draw.rectangle(box, tuple(map(int, colour)), "black")
        draw.text((left + LINE + LINE // 2, top), text, "black", font)
    return np.asarray(sheet)


def png(picture: np.ndarray) -> bytes:
    """A picture, uint8 (H, W, 3), as the contents of a PNG."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def output(flag: str, text: str, forms: Sequence[str] = FORMS) -> Path:
    """Where a figure can be written, seen before any work is done.

    Raises:
      UserError: it is an address, a folder is missing, or the form is not known.
    """
    if places.is_address(text):
        raise UserError(f"{flag} {text}: give a path on this machine, and copy from it")
    path = places.place(flag, text)
    if path.suffix.lower() not in forms:
        raise UserError(f"{flag} {path.name!r} must end in one of {', '.join(forms)}")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} does not exist: create it, or correct {flag}")
    return path


def save(drawn: Any, path: Path) -> None:
    """Writes a figure in the form that the path names; it may be in a bucket.

    Raises:
      UserError: it cannot be written.
    """
    file = io.BytesIO()
    drawn.savefig(file, dpi=150, format=path.suffix[1:].lower())
    try:
        with places.os_errors(path):
            path.write_bytes(file.getvalue())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}") from error
