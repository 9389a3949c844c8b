"""What tests of the data share."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def own_digits(digits_dir: Path, tmp_path: Path) -> Path:
    """A data directory with prepared digits that the test may spoil."""
    shutil.copytree(digits_dir, tmp_path / "data")
    return tmp_path / "data"
