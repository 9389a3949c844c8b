"""Figures for files: no window, no state between them."""

from pathlib import Path
from typing import Any

import numpy as np

from stvit_jax import places
from stvit_jax.errors import UserError, reason

FORMS = (".png", ".pdf", ".svg")


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure.

    Args:
      width: in inches.
      height: likewise.
    """
    from matplotlib.figure import Figure  # takes a second

    return Figure((width, height), layout="constrained")


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


def output(flag: str, text: str) -> Path:
    """Where a figure can be written, seen before any work is done.

    Raises:
      UserError: it is an address, a folder is missing, or the form is not known.
    """
    if places.is_address(text):
        raise UserError(f"{flag} {text}: give a path on this machine, and copy from it")
    path = places.place(flag, text)
    if path.suffix.lower() not in FORMS:
        raise UserError(f"{flag} {path.name!r} must end in one of {', '.join(FORMS)}")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} does not exist: create it, or correct {flag}")
    return path


def save(drawn: Any, path: Path) -> None:
    """Writes a figure in the form that the path names.

    Raises:
      UserError: it cannot be written.
    """
    try:
        drawn.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}") from error
