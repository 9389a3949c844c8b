"""The steps of a run compile for an H100 and for TPUs, by the compilers those have themselves.

Every program has a process of its own, `python -m benchmarks.program`; nothing needs the
accelerator. ptxas, which refuses kernels with too much shared memory or too many registers, is part
of it.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

import stvit_jax
from benchmarks.compilers import missing_packages
from stvit_jax.models.settings import abstract
from tests.program import ROOT

pytestmark = pytest.mark.compilers
STEPS = (("train", "bfloat16"), ("train", "float32"), ("infer", "bfloat16"))


LINES = json.loads((ROOT / "benchmarks/programs.json").read_text())


def often(target: str, config: str, mode: str, dtype: str) -> bool:
    """Whether it is compiled by default: training of stvit_small as published, on an H100.

    The others are the same operations in another width or dtype, and kernels have tests of their
    own. libtpu takes five minutes for it; a smaller step is compiled for four chips.
    """
    return (target, config, mode, dtype) == ("h100", "stvit_small", *STEPS[0])


PROGRAMS = [
    pytest.param(
        target, config, *step, marks=() if often(target, config, *step) else pytest.mark.slow
    )
    for target, configs in {
        "h100": ("stvit_small", "stvit_base", "stvit_large"),
        "a100": ("stvit_small",),
        "v5e:1x1": ("fashion_mnist", "stvit_small"),  # the former is stvit_tiny, the whole recipe
    }.items()
    for config in configs
    for step in STEPS
]


def python(target: str, *arguments: str, timeout: int) -> subprocess.CompletedProcess:
    if missing := missing_packages(target):
        reason = f"pip install -r requirements-compilers.txt: {', '.join(missing)} missing"
        # CI must not pass because it skipped.
        (pytest.fail if os.environ.get("STVIT_REQUIRE_COMPILERS") else pytest.skip)(reason)
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def compiled(target: str, *arguments: str, rows: Path, timeout: int = 1800) -> dict[str, Any]:
    """The row of a program."""
    command = ("benchmarks.program", "--target", target, *arguments, "--json", str(rows))
    result = python(target, *command, timeout=timeout)
    assert result.returncode == 0, result.stdout[-5000:]
    print("\n".join(result.stdout.splitlines()[-20:]))
    (row,) = map(json.loads, rows.read_text().splitlines())
    return row


def test_ptxas_is_asked() -> None:
    """Where XLA finds no ptxas it compiles in silence, and faults stay unseen."""
    result = python("h100", "tests.refused_by_ptxas", timeout=300)
    assert result.returncode != 0
    assert "uses too much shared data" in result.stdout, result.stdout[-5000:]


@pytest.mark.parametrize(
    "which, count", [((), 44), pytest.param(("all",), 152, marks=pytest.mark.slow)]
)
def test_kernels_for_hopper_compile_for_every_map_and_spill_nothing(which, count) -> None:
    result = python("h100", "tests.gpu_kernels", *which, timeout=3600)
    assert result.returncode == 0, result.stdout[-5000:]
    assert f"{count} kernels compiled" in result.stdout, result.stdout[-5000:]
    assert "four devices: each its own images" in result.stdout, result.stdout[-5000:]


@pytest.mark.parametrize(
    "which, count", [((), 54), pytest.param(("all",), 216, marks=pytest.mark.slow)]
)
def test_tpu_kernels_compile_for_every_map_and_copy_none(which, count) -> None:
    result = python("v5e:1x1", "tests.tpu_kernels", "v5e:1x1", *which, timeout=3600)
    assert result.returncode == 0, result.stdout[-5000:]
    assert f"{count} kernels compiled for v5e:1x1" in result.stdout, result.stdout[-5000:]


def test_enlarged_logits_are_nowhere() -> None:
    result = python("h100", "tests.gpu_loss", timeout=600)
    assert result.returncode == 0, result.stdout[-5000:]
    assert "nothing enlarged is written" in result.stdout, result.stdout[-5000:]


@pytest.mark.parametrize("target, config, mode, dtype", PROGRAMS)
def test_one_block_a_stage_compiles_and_moves_no_more_than_it_did(
    target, config, mode, dtype, tmp_path
) -> None:
    """The lines are those of benchmarks/programs.json; a program that moves less is a new line."""
    images = "256" if target == "h100" else "128"
    what = ("--config", f"configs/{config}.py", "--mode", mode, f"--config.dtype={dtype}")
    depths = ("--batch-size", images, "--depths", "1,1,1,1")
    row = compiled(target, *what, *depths, rows=tmp_path / "rows.jsonl")
    assert row["fits"] and not row["collectives"] and not row["stacked_reductions"]
    own = (target, dtype) != ("h100", "bfloat16")
    assert len(row["registers"]) == (0 if own else 16 if mode == "train" else 8)
    assert not any(row["spilled"])
    if target.startswith("v5e"):
        assert row["flops_per_image"] > 0 and row["bytes_per_image"] > 0
    for line in LINES:
        if all(line[key] == row[key] for key in ("target", "model", "mode", "dtype")):
            assert line["batch_size"] == int(images)
            moved = moves(row)
            assert moved <= 1.005 * line["megabytes_per_image"]
            return
    assert target == "a100" or dtype == "float32" or config == "fashion_mnist"


def moves(row: dict[str, Any]) -> float:
    """MB an image: on a GPU of the whole network, on a TPU what its compiler says of these blocks.

    That counts what it moves between memory and chip, and slices, as often as it likes.
    """
    if row["bytes_per_image"]:
        return row["bytes_per_image"] / 1e6
    return row["traffic"]["megabytes_per_image"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100", "v5e:1x1"])
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_whole_small_compiles(target, mode, tmp_path) -> None:
    what = ("--model", "stvit_small", "--mode", mode, "--batch-size", "128")
    assert compiled(target, *what, rows=tmp_path / "rows.jsonl", timeout=7200)["fits"]


@pytest.mark.slow
def test_a_step_of_segmentation_moves_no_more_than_it_did(tmp_path) -> None:
    what = ("--model", "upernet:stvit_small", "--batch-size", "16", "--depths", "1,1,1,1")
    row = compiled("h100", *what, rows=tmp_path / "rows.jsonl")
    (line,) = (line for line in LINES if line["model"] == row["model"])
    assert row["fits"] and not row["collectives"]
    assert len(row["registers"]) == 16 and not any(row["spilled"])
    assert moves(row) <= 1.005 * line["megabytes_per_image"]


@pytest.mark.parametrize("images", [pytest.param(128, marks=pytest.mark.slow), 64])
def test_what_four_chips_say_to_each_other_in_a_step(images, tmp_path) -> None:
    """Gradients, running statistics, metrics; the norms and mixup only where groups span chips."""
    row = compiled(
        "v5e:2x2",
        *("--model", "stvit_tiny", "--config.image_size=32", "--batch-size", str(4 * images)),
        rows=tmp_path / "rows.jsonl",
    )
    variables = abstract(stvit_jax.create_model("stvit_tiny", num_classes=1000))
    gradients = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    norms = [
        leaf.shape[0]
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["batch_stats"])
        if path[-1].key == "mean"
    ]
    statistics = 2 * sum(norms)  # means and variances
    found = row["collectives"]
    sums = [c for c in found if c["kind"] == "all-reduce"]
    # Every gradient is sent once, in its own dtype; loss and unreadable examples are the metrics.
    sent = gradients + statistics + 2
    # In float32, but for the kernels of the seven convolutions.
    narrow = sum(
        math.prod(leaf.shape)
        for leaf in jax.tree.leaves(variables["params"])
        if len(leaf.shape) == 4 and leaf.shape[2] > 1
    )
    assert {c["dtype"] for c in sums} <= {"bf16", "f32", "s32", "bf16+f32+s32", "f32+s32"}
    numbers = sum(c["elements"] * c["count"] for c in sums)
    assert sum(c["bytes"] * c["count"] for c in sums) == 4 * numbers - 2 * narrow
    if images % row["group_size"] == 0:
        assert found == sums
        assert sum(c["count"] for c in sums) <= 3
        assert numbers == sent
        return
    # A norm sends its sums over a group, and in the gradient those of its cotangents.
    assert numbers == sent + 2 * statistics
    for width in set(norms):
        of_norms = [c["count"] for c in sums if c["elements"] == 2 * width and c["dtype"] == "f32"]
        assert sum(of_norms) == 2 * norms.count(width)
    assert sum(c["count"] for c in sums) <= 2 * len(norms) + 4
    # Mixup's partners: one permute of images, one of their labels.
    permutes = sorted((c["elements"], c["count"]) for c in found if c not in sums)
    assert permutes == [(images * 1000, 1), (images * 32 * 32 * 3, 1)]
