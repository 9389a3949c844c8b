"""How many images an evaluation has seen, and how many of them could not be read."""

from typing import Any

from stvit_jax.errors import UserError
from stvit_jax.training.task import Metrics


def images(total: dict[str, Any]) -> Metrics:
    """`count` and `unreadable` of the sums over a whole set.

    Raises:
      UserError: no image could be read.
    """
    count, unreadable = int(total["count"]), int(total["unreadable"])
    if count == unreadable:
        raise UserError(
            f"none of the {count} images to evaluate on can be read, so there is no result: look "
            "at the files"
        )
    return {"count": count, "unreadable": unreadable}


def describe(metrics: Metrics, more: str = "") -> str:
    """Them in words, in brackets, and what else is said there."""
    unreadable = int(metrics["unreadable"])
    broken = f", {unreadable} of them unreadable" if unreadable else ""
    return f"({int(metrics['count'])} images{broken}{more})"
