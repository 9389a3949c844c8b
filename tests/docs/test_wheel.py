"""A wheel of this repository, beside its dependencies and in an environment that holds nothing."""

import os
import shutil
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


def run(*command: object, cwd: Path, **variables: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=clean | variables,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Of a copy: setuptools would take what builds before have left in the checkout.
    copy = folder / "checkout"
    copy.mkdir()
    for name in ("stvit_jax", "pyproject.toml", "requirements.txt", "README.md"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, copy, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture
def folder(tmp_path: Path, random_variables) -> Path:
    """A network and a picture."""
    model = stvit_jax.create_model("stvit_tiny")
    stvit_jax.save_pretrained(tmp_path / "tiny", model, random_variables(model), image_size=32)
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "black.png")
    return tmp_path


def assert_works(python: Path | str, folder: Path, **variables: str) -> None:
    predict = (python, "-m", "stvit_jax.predict", "--weights", "tiny", "black.png")
    assert run(*predict, cwd=folder, **variables).count("%") == 5
    summary = (python, "-m", "stvit_jax.summary", "stvit_tiny")
    assert "1,185,978" in run(*summary, cwd=folder, **variables)


def test_a_wheel_holds_the_package_and_works(wheel: Path, folder: Path) -> None:
    """With the packages of these tests, and from no checkout."""
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = subprocess.run(
        ["git", "ls-files", "stvit_jax"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(modules.stdout.split()) <= held
    assert not [name for name in held if name.startswith(("tests/", "benchmarks/", "docs/"))]
    into = folder / "installed"
    install = ("-m", "pip", "install", "-q", "--no-deps", "--target", into, wheel)
    run(sys.executable, *install, cwd=folder)
    assert_works(sys.executable, folder, PYTHONPATH=str(into))


@pytest.mark.slow
def test_a_wheel_works_in_an_empty_environment(wheel: Path, folder: Path) -> None:
    run(sys.executable, "-m", "venv", folder / "env", cwd=folder)
    python = folder / "env/bin/python"
    run(python, "-m", "pip", "install", "-q", wheel, cwd=folder)
    assert_works(python, folder)
