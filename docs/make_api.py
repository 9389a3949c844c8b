"""Writes docs/api.md from the docstrings of what the package names.

python -m docs.make_api
"""

import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import stvit_jax

PAGE = Path(__file__).parent / "api.md"
# Modules that the package names, and what of them is meant for users where it is not all.
MODULES = {
    "torch_weights": None,
    "schedules": None,
    "data": ("eval_image", "normalize"),
    "augment": ("apply_op",),
    "models.heads": ("UPerHead", "FCNHead", "SemanticFPN"),
    "ops.super_tokens": None,
    "ops.resize": ("bilinear", "nearest"),
}
METHODS = (
    "__call__",
    "features",
    "feature_maps",
)  # beside those of every Flax module
LISTS = {"Args:": "Arguments", "Raises:": "Raises", "Attributes:": "Attributes"}


def page() -> str:
    """The whole page."""
    parts = [
        "# Reference",
        "Made from the docstrings by `python -m docs.make_api`; a test holds it to them. "
        "Shapes: B images, H x W pixels, C channels.",
        "## stvit_jax",
        *entries(stvit_jax, [n for n in stvit_jax.__all__ if not is_module(n)]),
    ]
    network = importlib.import_module("stvit_jax.models.stvit").STViT
    parts += ["## The network", markdown(network), *entries(network, METHODS)]
    segmenter = importlib.import_module("stvit_jax.models.segmenter").Segmenter
    parts += ["## The segmenter", markdown(segmenter)]
    parts += entries(segmenter, ("__call__", "head_logits"))
    for name, public in MODULES.items():
        module = importlib.import_module(f"stvit_jax.{name}")
        parts += [f"## stvit_jax.{name}", first_paragraph(module)]
        parts += entries(module, public or own(module))
    return "\n\n".join(parts) + "\n"


def is_module(name: str) -> bool:
    """Whether the package means a module by it."""
    return inspect.ismodule(getattr(stvit_jax, name))


def own(module: Any) -> list[str]:
    """Public functions that a module itself defines, in its order."""
    defined = inspect.getmembers(module, inspect.isfunction)
    public = [f for n, f in defined if n[0] != "_" and f.__module__ == module.__name__]
    return [f.__name__ for f in sorted(public, key=lambda f: f.__code__.co_firstlineno)]


def entries(module: Any, names: Sequence[str]) -> Iterator[str]:
    """Heading, signature and text of every name."""
    for name in names:
        thing = getattr(module, name)
        if inspect.isclass(thing) and issubclass(thing, Exception):
            yield f"### {name}\n\n{markdown(thing)}"
            continue
        takes = inspect.signature(thing)
        if inspect.isclass(thing):  # a Flax module: without what Flax gives to all
            fields = [p for n, p in takes.parameters.items() if n not in ("parent", "name")]
            takes = takes.replace(parameters=fields, return_annotation=takes.empty)
        signature = str(takes).replace("collections.abc.", "")
        signature = re.sub(r"<class '([\w.]+)'>", r"\1", signature)
        signature = re.sub(r"(?:[a-z_]+\.)+(?=[A-Z])", "", signature)
        yield f"### {name}\n\n```python\n{name}{signature}\n```\n\n{markdown(thing)}"


def first_paragraph(module: Any) -> str:
    """Of its docstring."""
    return (inspect.getdoc(module) or "").split("\n\n")[0]


def markdown(thing: Any) -> str:
    """A docstring in Google's style as Markdown: sections become lists."""
    lines, section = [], ""
    for line in (inspect.getdoc(thing) or "").splitlines():
        named = re.match(r"  (\*{0,2}\w+(?:, \w+)*): (.*)", line)
        if line in LISTS or line == "Returns:":
            section = line
            lines += [f"**{LISTS.get(line, 'Returns')}**", ""]
        elif section in LISTS and re.match(r"  \S", line):
            lines.append(f"- `{named[1]}`: {named[2]}" if named else f"- {line.strip()}")
        elif section in LISTS and line.strip():
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line.strip() if section else line)
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
