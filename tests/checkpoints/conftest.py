"""What the tests of checkpoints share: a directory of two, and what was logged."""

import logging as standard_logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import logging

from stvit_jax.checkpoints.manager import Checkpoints
from tests.checkpoints.states import arrays, on_devices


@pytest.fixture
def log() -> Iterator[list[standard_logging.LogRecord]]:
    """Everything that reaches absl's handlers, down to DEBUG."""
    records: list[standard_logging.LogRecord] = []
    handler = standard_logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger, verbosity = logging.get_absl_logger(), logging.get_verbosity()
    logging.set_verbosity(logging.DEBUG)
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with sound checkpoints 1 and 2; copy it before damaging it."""
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    checkpoints = Checkpoints(directory, keep=2)
    for position in (1, 2):
        checkpoints.save(position, on_devices(arrays(position)))
    checkpoints.close()
    return directory


@pytest.fixture
def directory(two: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two, tmp_path / "checkpoints"))
