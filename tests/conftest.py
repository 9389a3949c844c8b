"""What all tests share: the platform, golden numbers, float64."""

import importlib.util
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the tests' time is LLVM's, on programs that run once: let it not optimise them.
# Its code generator is the one that compiles in half the time; versions after 0.10 have no choice,
# and end at a flag that they do not know.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."),
)
# Programs that the tests start keep what they compile where a test says so, never in a home; the
# thirty small ones of a run, too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# PyTorch's threads wait for each other on a busy machine: that made tests ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import numpy as np
import pytest

from stvit_jax.data import digits
from stvit_jax.models.settings import backbone
from tests.golden.golden_weights import weight
from tests.program import NARROW, STEPS, WORKER, Program

# nohup and some CI runners ignore SIGHUP; train.py respects that, and would inherit it here.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

DATA = Path(__file__).parent / "golden"

# The newest Python that is tested has no small PyTorch: there the comparisons with it are left out.
WITHOUT_TORCH = importlib.util.find_spec("torch") is None
collect_ignore = [
    str(path)
    for path in Path(__file__).parent.rglob("test_*.py")
    if WITHOUT_TORCH and re.search(r"^import torch$", path.read_text(), re.MULTILINE)
]


def pytest_report_header() -> str:
    """Says what is left out."""
    return f"PyTorch is missing: {len(collect_ignore)} files left out" if WITHOUT_TORCH else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: the last that is begun decides when the two workers are done."""
    first = ("tests/docs/test_commands.py", "tests/programs/")
    items.sort(key=lambda item: [name not in item.path.as_posix() for name in first])


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


@pytest.fixture(scope="session")
def random_variables() -> Callable[..., dict[str, Any]]:
    """Non-trivial float32 variables of a network, without compiling its initialisation."""

    def draw(model: Any, image_size: int = 32) -> dict[str, Any]:
        images = jax.ShapeDtypeStruct(
            (1, image_size, image_size, backbone(model).in_chans), np.float32
        )
        rng = np.random.default_rng(0)

        def leaf(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
            name = path[-1].key
            if name == "count":
                return np.zeros((), np.int32)
            if name in ("scale", "var", "gamma_1", "gamma_2"):
                return rng.uniform(0.5, 1.5, shape.shape).astype(np.float32)
            fan_in = np.prod(shape.shape[:-1]) if name == "kernel" else 100
            return rng.normal(0, fan_in**-0.5, shape.shape).astype(np.float32)

        abstract = jax.eval_shape(model.init, jax.random.key(0), images)
        return jax.tree_util.tree_map_with_path(leaf, abstract)

    return draw


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of runs that share compiled programs, whatever test starts them."""
    return {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}


@pytest.fixture(scope="session")
def start(digits_dir, compiled):
    """Starts the program on the digits."""

    def start(workdir: Path, *flags: str, **options: Any) -> Program:
        common = (
            *NARROW,
            f"--config.data.dir={digits_dir}",
            "--config.batch_size=64",
            f"--config.steps={STEPS}",
            "--config.log_every=1",
            "--config.eval_every_epochs=1",
            "--config.checkpoint_every=1000",
            "--config.data.workers=0",
        )
        return Program(workdir, *common, *flags, **(compiled | options))

    return start


@pytest.fixture(scope="session")
def straight(start, tmp_path_factory) -> Path:
    """The workdir of a run that nobody stopped."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    program = start(workdir, WORKER, tensorflow=True)
    assert program.wait() == 0, program.output
    assert program.output.splitlines()[-1].startswith(f"done: step {STEPS} of {STEPS}, raw top-1")
    assert program.output.splitlines()[-1].endswith(f"see {workdir}")
    return workdir


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """tests/golden."""
    return DATA
