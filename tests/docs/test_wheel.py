"""A wheel of this repository, in an environment that holds nothing else."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import stvit_jax
from tests.program import ROOT

pytestmark = pytest.mark.docs


def run(*command: object, cwd: Path) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_wheel_works_in_an_empty_environment(tmp_path: Path, random_variables) -> None:
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = subprocess.run(
        ["git", "ls-files", "stvit_jax"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(modules.stdout.split()) <= held
    assert not [name for name in held if name.startswith(("tests/", "benchmarks/", "docs/"))]

    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env/bin/python"
    run(python, "-m", "pip", "install", "-q", wheel, cwd=tmp_path)
    model = stvit_jax.create_model("stvit_tiny")
    stvit_jax.save_pretrained(tmp_path / "tiny", model, random_variables(model), image_size=32)
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "black.png")
    said = run(python, "-m", "stvit_jax.predict", "--weights", "tiny", "black.png", cwd=tmp_path)
    assert said.count("%") == 5
    assert "1,185,978" in run(python, "-m", "stvit_jax.summary", "stvit_tiny", cwd=tmp_path)
