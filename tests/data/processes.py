"""Programs in processes of their own, for what a test cannot do to itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_script(
    program: str, folder: Path, *arguments: object, before: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    """Runs a program from a file in `folder`, which worker processes import anew."""
    script = folder / "script.py"
    script.write_text(program)
    return subprocess.run(
        [*before, sys.executable, script, *map(str, arguments)],
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=120,
    )


def without_privileges() -> tuple[str, ...]:
    """A command's beginning, with which permissions hold for root as well."""
    if os.geteuid():
        return ()
    if not shutil.which("setpriv"):
        pytest.skip("root without setpriv may read everything")
    rights = "-dac_override,-dac_read_search"
    return ("setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}")
