"""What the tests of checkpoints share: a directory of two, a small network, a workdir with it."""

import json
import logging as standard_logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging

from stvit_jax.checkpoints.manager import Checkpoints
from stvit_jax.checkpoints.weights import Weights
from stvit_jax.models.settings import SETTINGS
from tests.checkpoints.networks import tree_of
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


@pytest.fixture
def overrides(data_dir) -> dict:
    return json.loads((data_dir / "tiny_config.json").read_text())


@pytest.fixture
def tiny(overrides, golden_state) -> Weights:
    settings = {k: overrides.get(k, 3) for k in SETTINGS}
    return Weights(
        tree_of(golden_state("tiny")), {"name": "stvit_small", **settings}, Path("made"), {}
    )


@pytest.fixture
def workdir(tmp_path, tiny, overrides) -> Callable[..., Path]:
    """Saves a run's checkpoint at a step; parameters are the tiny ones plus the step."""
    path = tmp_path / "run"
    path.mkdir()
    model = {"name": "stvit_small", **overrides, "num_classes": None}  # that is from the data
    (path / "config.json").write_text(json.dumps({"batch_size": 8, "model": model}))

    def save(step: int, ema: bool = True) -> Path:
        def shifted(by: float) -> dict:
            return jax.tree.map(
                lambda x: jnp.asarray(x + by if x.ndim else x, np.float32 if x.ndim else np.int32),
                tiny.variables,
            )

        variables = shifted(step)
        state = {
            "step": jnp.int32(step),
            "opt_state": optax.adamw(0.1).init(variables["params"]),
            "ema": shifted(step + 0.5) if ema else {},
            **variables,
        }
        checkpoints = Checkpoints(path / "checkpoints", keep=3)
        checkpoints.save(step, state)
        checkpoints.close()
        return path

    return save
