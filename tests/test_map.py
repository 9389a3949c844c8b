"""The map of docs/architecture.md is the tree itself: every file a line, every line a file."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
SKIPPED = {"__init__.py", "py.typed"}


def mapped() -> dict[str, str]:
    """What it says of every path: two spaces a level, folders end in a slash."""
    page = (ROOT / "docs/architecture.md").read_text()
    text = page.split("<!-- map -->")[1].split("<!-- end -->")[0]
    found: dict[str, str] = {}
    parents: list[str] = []
    for line in text.splitlines():
        if not (match := re.match(r"    ( *)(\S+)(?: +(\S.*))?$", line)):
            continue
        indent, name, words = match.groups()
        del parents[len(indent) // 2 :]
        found["".join(parents) + name] = words or ""
        if name.endswith("/"):
            parents.append(name)
    return found


def test_every_file_has_its_line() -> None:
    kinds = ("*.py", "examples/*", "launch/*")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *kinds],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    files = {
        name
        for name in listed
        if not name.startswith("tests/")
        and Path(name).name not in SKIPPED
        and (ROOT / name).exists()
    }
    known = mapped()
    missing = sorted(files - known.keys())
    gone = sorted(name for name in known if not (ROOT / name).exists())
    assert not missing and not gone, f"not on the map: {missing}; on it, and not there: {gone}"
    assert all(known[name] for name in files), "a line says what the file is for"
