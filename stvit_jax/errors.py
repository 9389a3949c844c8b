"""Mistakes that a user can mend, and how messages are worded: one line, nothing endless in it."""

import difflib
from collections.abc import Iterable

LONGEST = 300  # characters of one quotation
MOST_NAMES = 10  # in a listing


class UserError(ValueError):
    """A mistake in what the user gave (config, folder, weights, checkpoint).

    The message is one line that names the thing and the remedy. Entry points print it without a
    traceback and exit with a failure status.
    """


class Interrupted(Exception):
    """Whoever waits has been asked to stop, and what was waited for never came."""


def one_line(what: object, longest: int = LONGEST) -> str:
    """What an exception says, or a value's text, as one printable line of bounded length.

    An exception without words gives its type. Of a long text the end is kept as well as the
    beginning, because libraries put the cause last. Control characters are escaped: names out of
    files must not steer a terminal.
    """
    text = " ".join(str(what).split()) or type(what).__name__
    if len(text) > longest:
        text = f"{text[: longest // 2 - 5]} ... {text[-longest // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def described(error: BaseException) -> str:
    """Type and words of an exception, for faults that a library met."""
    return f"{type(error).__name__}: {one_line(error)}"


def reason(error: OSError) -> str:
    """Why the system refused, in its own words: `No space left on device`."""
    return one_line(error.strerror or error)


def kind_of(value: object) -> str:
    """What stands where an array should: `uint8 (2, 32, 32, 3)`, or the name of its type."""
    kind = type(value)
    if kind.__module__ == "torch":
        return f"a torch.{kind.__name__}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"of type {kind.__name__}"


def listing(names: Iterable[object], most: int = MOST_NAMES) -> str:
    """The first names, and how many more there are; `none` where there are none."""
    names = list(names)
    more = f" and {len(names) - most} more ({len(names)} in all)" if len(names) > most else ""
    return (", ".join(one_line(name, 100) for name in names[:most]) or "none") + more


def did_you_mean(name: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> str:
    """`did you mean X? ` with the nearest of the known names; nothing where none is near."""
    close = difflib.get_close_matches(name, list(known), most, cutoff)
    return f"did you mean {' or '.join(close)}? " if close else ""
