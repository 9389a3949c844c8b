"""The table of docs/pods.md, from the rows that benchmarks.program has appended to a file.

python -m benchmarks.pods docs/pods.jsonl
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compilers import GIB
from stvit_jax.command_line import entry, parser
from stvit_jax.console import say

HEADS = (
    "network",
    "target",
    "images a chip",
    "flags",
    "a chip's memory, GiB",
    "fits",
    "GFLOP an image",
    "GB a chip and step",
    "collectives a step",
    "MB sent",
    "compiled in, s",
)


def table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Rows as lines of Markdown; `-` is what a compiler that finds no room does not tell."""
    lines = [HEADS, ("---",) * len(HEADS), *map(_cells, rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def flags(row: dict[str, Any]) -> str:
    """What its command line has besides target, network and batch."""
    given = [f"--mode {row['mode']}"] if row["mode"] != "train" else []
    if row["depths"] != "whole":
        given.append(f"--depths {','.join(map(str, row['depths']))}")
    if row["remat"]:
        given.append(f"--remat {','.join(map(str, row['remat']))}")
    if row["accumulation"] > 1:
        given.append(f"--accumulation {row['accumulation']}")
    return f"`{' '.join(given)}`" if given else ""


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    share = row["batch_size"] // row["chips"]
    peak = f"{row['peak_bytes'] / GIB:.1f}" if row["peak_bytes"] else "-"
    peak = f"> {peak}" if "error" in row and row["peak_bytes"] else peak  # of temporaries alone
    known = ("-",) * 4
    if "collectives" in row:
        sent = row["collectives"]
        known = (
            f"{row['flops_per_image'] / 1e9:.1f}",
            f"{row['bytes_per_image'] * share / 1e9:.0f}",
            str(sum(c["count"] for c in sent)),
            f"{sum(c['count'] * c['bytes'] for c in sent) / 1e6:.0f}",
        )
    return (
        row["model"].removeprefix("stvit_"),
        row["target"],
        str(share),
        flags(row),
        f"{peak} of {row['chip_bytes'] // GIB}",
        _fits(row),
        *known,
        str(row["compile_seconds"]),
    )


def _fits(row: dict[str, Any]) -> str:
    again = row.get("recomputed")
    return ("yes" if row["fits"] else "**no**") + (f", {again} done twice" if again else "")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    of = parser("python -m benchmarks.pods", __doc__)
    of.add_argument("rows", type=Path)
    rows = map(json.loads, of.parse_args(argv).rows.read_text().splitlines())
    for line in table(rows):
        say(line)


if __name__ == "__main__":
    entry(main)
