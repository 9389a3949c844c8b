"""The steps of a run compile for an H100 and for a TPU v5e, by the compilers those have themselves.

Every program has a process of its own; nothing needs the accelerator. ptxas, which refuses kernels
with too much shared memory or too many registers, is part of it.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compile_for import ENVIRONMENT, PACKAGES

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.compilers
STEPS = (("train", "bfloat16"), ("train", "float32"), ("eval", "bfloat16"))
PROGRAMS = [
    (device, config, *step)
    for device, configs in {
        "h100": ("stvit_small", "stvit_base", "stvit_large"),
        "v5e": ("fashion_mnist", "stvit_small"),  # the former is stvit_tiny with the whole recipe
    }.items()
    for config in configs
    for step in STEPS
]


def compile_for(device: str, *arguments: str, timeout: int) -> subprocess.CompletedProcess:
    installed = {d.name.lower() for d in importlib.metadata.distributions()}
    if missing := set(PACKAGES[device]) - installed:
        reason = f"pip install -r requirements-compilers.txt: {', '.join(sorted(missing))} missing"
        # CI must not pass because it skipped.
        (pytest.fail if os.environ.get("STVIT_REQUIRE_COMPILERS") else pytest.skip)(reason)
    return subprocess.run(
        [sys.executable, "-m", "tests.compile_for", device, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def assert_compiles(*arguments: str, timeout: int) -> None:
    result = compile_for(*arguments, timeout=timeout)
    assert result.returncode == 0, result.stdout[-5000:]
    assert "compiled in" in result.stdout
    print(result.stdout.splitlines()[-1])


def test_ptxas_is_asked():
    """Where XLA finds no ptxas it compiles in silence, and faults stay unseen."""
    result = compile_for("h100", "-", "too_much_shared_memory", "float32", timeout=300)
    assert result.returncode != 0
    assert "uses too much shared data" in result.stdout, result.stdout[-5000:]


@pytest.mark.parametrize("device, config, what, dtype", PROGRAMS)
def test_one_block_a_stage_compiles(device, config, what, dtype):
    assert_compiles(device, config, what, dtype, timeout=1800)


@pytest.mark.slow
@pytest.mark.parametrize("device", ENVIRONMENT)
@pytest.mark.parametrize("what", ["train", "eval"])
def test_whole_small_compiles(device, what):
    assert_compiles(device, "stvit_small", what, "bfloat16", "--whole", timeout=7200)
