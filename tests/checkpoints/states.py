"""States to save, and how the tests of checkpoints save, restore and start programs."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stvit_jax.checkpoints.manager import Checkpoints
from tests.privileges import unprivileged


class Moments(NamedTuple):
    mean: Any
    square: Any


@flax.struct.dataclass
class State:
    """The shape of a training state: a dataclass, dictionaries, a tuple, several dtypes."""

    step: Any
    params: dict[str, Any]
    moments: tuple[Moments, ...]


def arrays(position: int) -> State:
    """The state that belongs to a position, as numpy arrays: any bits that are finite."""
    rng = np.random.default_rng(position)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return State(
        step=np.int32(position),
        params={"stem": {"kernel": normal(3, 3, 8, 16), "bias": normal(16)}, "half": normal(8, 8)},
        moments=(Moments(mean=normal(8, 32).astype(jnp.bfloat16), square=normal(64)),),
    )


def on_devices(state: State) -> State:
    """Replicated over all devices, but the moments, whose first axis is sharded."""
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    return State(
        step=jax.device_put(state.step, replicated),
        params=jax.device_put(state.params, replicated),
        moments=jax.device_put(state.moments, sharded),
    )


def abstract(state: State) -> State:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def target() -> State:
    return abstract(on_devices(arrays(0)))


def assert_is(state: State, position: int) -> None:
    """Every bit, the containers and the dtypes."""
    want = arrays(position)
    assert jax.tree.structure(state) == jax.tree.structure(want)
    for got, expected in zip(jax.tree.leaves(state), jax.tree.leaves(want), strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert np.asarray(got).tobytes() == expected.tobytes()


def saved(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir())


def in_time(function: Callable[[], Any], seconds: float = 60) -> Any:
    """Its result or exception; a hang fails the test instead of stopping all of them."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((function(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"hangs for more than {seconds} s"
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def restore(directory: Path, state: State | None = None) -> tuple[int, State] | None:
    def run() -> tuple[int, State] | None:
        checkpoints = Checkpoints(directory, keep=2)
        try:
            found = checkpoints.restore_newest(target() if state is None else state)
            return found and found[:2]
        finally:
            checkpoints.close()

    return in_time(run)


def slow_digest(array: np.ndarray) -> str:
    """The two hashes in numpy, element by element in memory order."""

    def mix(x: np.ndarray, shift: int, first: int, second: int) -> np.ndarray:
        x = (x ^ (x >> np.uint32(16))) * np.uint32(first)
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(second)
        return x ^ (x >> np.uint32(16))

    def a(x: np.ndarray) -> np.ndarray:
        return mix(x, 15, 0x7FEB352D, 0x846CA68B)

    def b(x: np.ndarray) -> np.ndarray:
        return mix(x, 13, 0x85EBCA6B, 0xC2B2AE35)

    flat = np.ascontiguousarray(array).reshape(-1)
    size = flat.dtype.itemsize
    words = flat.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}[size])
    words = words.reshape(flat.size, max(1, size // 4)).astype(np.uint32)
    position = np.arange(flat.size, dtype=np.uint32)
    first, second = b(position), a(position)
    for word in words.T:
        first, second = a(first ^ word), b(second + word)
    return f"{first.sum(dtype=np.uint32):08x}{second.sum(dtype=np.uint32):08x}"


def child(
    file: str,
    name: str,
    *args: object,
    devices: int = 1,
    rights: bool = True,
    **environment: str,
) -> subprocess.Popen[str]:
    """Starts a test file as a program that calls the function of that name."""
    command = [sys.executable, file, name, *map(str, args)]
    return subprocess.Popen(
        command if rights else unprivileged(*command),
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen[str]) -> tuple[list[str], list[str]]:
    """Its lines on stdout and stderr, once it has ended well."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.splitlines(), err.splitlines()
