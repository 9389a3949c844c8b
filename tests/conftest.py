"""What all tests share: the platform, golden numbers, float64."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

from stvit_jax.data import digits
from tests.data.golden_weights import weight

DATA = Path(__file__).parent / "data"


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def golden_state() -> Callable[[str], dict[str, np.ndarray]]:
    """The PyTorch state dict, by name of the golden model, that the golden numbers belong to."""

    def state(name: str) -> dict[str, np.ndarray]:
        shapes = json.loads((DATA / f"state_keys/{name}.json").read_text())
        return {key: weight(key, shape) for key, shape in shapes.items()}

    return state


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tfds data directory with the prepared digits."""
    path = tmp_path_factory.mktemp("tfds")
    digits.prepare(str(path))
    return path


@pytest.fixture
def no_tensorflow(tmp_path: Path) -> dict[str, str]:
    """Environment variables for a child process in which TensorFlow cannot be imported."""
    package = tmp_path / "blocked" / "tensorflow"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('blocked')\n")
    return {"PYTHONPATH": str(package.parent)}


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """tests/data."""
    return DATA
