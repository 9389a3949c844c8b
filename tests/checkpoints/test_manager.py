"""Checkpoints: bits, damage, full disks, kill -9, other device counts.

What ends a process, limits its files or needs another device count runs this file as a program.
"""

import logging as standard_logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stvit_jax.checkpoints.manager import Checkpoints, leaf_digests
from stvit_jax.errors import UserError


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
            return checkpoints.restore_newest(target() if state is None else state)
        finally:
            checkpoints.close()

    return in_time(run)


# Digests.


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


DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 4), (7,), (3, 4, 5)])
def test_digest_is_that_of_the_slow_loop(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(scale=50, size=shape).astype(jnp.dtype(dtype))
    digests, non_finite = leaf_digests({"leaf": jnp.asarray(array)})
    assert digests == {"leaf": slow_digest(array)} and non_finite == []


def test_digest_sees_every_flipped_bit_and_every_swap() -> None:
    bits = np.arange(24, dtype=np.uint32) << 22  # few bits set, as in small and round numbers

    def digest(array: np.ndarray) -> str:
        return leaf_digests({"leaf": jnp.asarray(array.view(np.float32))})[0]["leaf"]

    seen = {digest(bits)}
    for element in range(bits.size):
        for bit in range(32):
            changed = bits.copy()
            changed[element] ^= np.uint32(1 << bit)
            seen.add(digest(changed))
    assert len(seen) == 1 + 32 * bits.size
    for one in range(bits.size):
        for other in range(one):
            changed = bits.copy()
            changed[[one, other]] = changed[[other, one]]
            seen.add(digest(changed))
    assert len(seen) == 1 + 32 * bits.size + bits.size * (bits.size - 1) // 2


def test_digest_names_leaves_that_are_not_finite() -> None:
    state = arrays(0)
    state.params["stem"]["bias"][3] = np.nan
    state.moments[0].mean[7, 31] = -np.inf
    assert leaf_digests(on_devices(state))[1] == ["moments/0/mean", "params/stem/bias"]


# Saving and restoring.


def test_restored_is_saved_bit_by_bit(directory: Path) -> None:
    position, state = restore(directory)
    assert position == 2
    assert_is(state, 2)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, target())


def test_an_empty_directory_holds_no_checkpoint(tmp_path: Path) -> None:
    assert restore(tmp_path / "new") is None


def save_and_donate(directory: Path) -> None:
    """Saves each state and gives its memory at once to the next, as a training loop does."""
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + x + 1, s), donate_argnums=0)
    checkpoints = Checkpoints(directory, keep=9)
    for position in (1, 2, 3):
        state = on_devices(arrays(position))
        checkpoints.save(position, state)
        for _ in range(5):
            state = advance(state)
        jax.block_until_ready(state)
    checkpoints.wait()
    for position in (3, 2, 1):
        newest, state = checkpoints.restore_newest(target())
        assert newest == position
        restored = jax.tree.map(lambda x: np.array(x, copy=True), state)
        jax.block_until_ready(advance(state))  # what was restored can be donated too
        assert_is(restored, position)
        shutil.rmtree(directory / str(position))
        checkpoints.close()
        checkpoints = Checkpoints(directory, keep=9)
    checkpoints.close()


def test_saved_state_may_be_donated(tmp_path: Path) -> None:
    save_and_donate(tmp_path / "checkpoints")


def test_only_the_newest_are_kept_and_a_saved_position_is_left_alone(
    tmp_path: Path, log: list[standard_logging.LogRecord]
) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.wait() is None
    for position in (10, 20, 30, 40):
        checkpoints.save(position, on_devices(arrays(position)))
    checkpoints.save(40, on_devices(arrays(1)))
    checkpoints.close()
    assert saved(tmp_path / "c") == [30, 40] and log == []
    assert_is(restore(tmp_path / "c")[1], 40)


def test_a_state_that_is_not_finite_is_not_saved(directory: Path) -> None:
    state = arrays(3)
    state.params["stem"]["kernel"][0, 0, 0, 0] = np.nan
    checkpoints = Checkpoints(directory, keep=1)
    with pytest.raises(UserError, match="batch 3 .* non-finite values in params/stem/kernel;"):
        checkpoints.save(3, on_devices(state))
    checkpoints.close()
    assert saved(directory) == [1, 2]
    assert restore(directory)[0] == 2


def test_a_checkpoint_of_another_network_is_refused_and_stays(directory: Path) -> None:
    other = target()
    params = dict(other.params)
    params["half"] = jax.ShapeDtypeStruct((8, 9), jnp.float32, sharding=params["half"].sharding)
    params["head"] = params["half"]
    with pytest.raises(UserError, match=r"2 is of another network") as error:
        restore(directory, other.replace(params=params))
    assert "params/half is float32(8, 8) there and float32(8, 9) here" in str(error.value)
    assert "params/head is absent there and float32(8, 9) here" in str(error.value)
    assert saved(directory) == [1, 2]


def test_a_target_without_shardings_is_refused(directory: Path) -> None:
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), target())
    with pytest.raises(
        ValueError, match="no sharding at step, params/half, params/stem/bias and 3"
    ):
        restore(directory, bare)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/checkpoints: .* another workdir"):
        Checkpoints(tmp_path / "file" / "checkpoints", keep=1)


def test_nothing_but_damage_is_logged(
    tmp_path: Path, log: list[standard_logging.LogRecord]
) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(1, on_devices(arrays(1)))
    checkpoints.save(2, on_devices(arrays(2)))
    checkpoints.restore_newest(target())
    checkpoints.close()
    assert [record.getMessage() for record in log] == []


# Damage.


def flip(position: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(position * (len(content) - 1))] ^= 4
        path.write_bytes(content)

    return damage


DAMAGES = {
    "bit flipped at the start": flip(0),
    "bit flipped at a third": flip(1 / 3),
    "bit flipped in the middle": flip(0.5),
    "bit flipped near the end": flip(0.9),
    "bit flipped at the end": flip(1),
    "truncated by half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "truncated by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "deleted": lambda path: path.unlink(),
}
# Without these nothing can be restored; the rest of a checkpoint repeats or describes them.
ESSENTIAL = ("meta/metadata", "state/_METADATA", "state/manifest.ocdbt", "state/d/")

# Orbax's readers may leave a callback behind when one of them fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def check_damage(directory: Path, damage: Callable[[Path], None], file: str, log: list) -> bool:
    """Damages a file of checkpoint 2. True: noticed, and 1 restored. False: 2 as it was."""
    copy = directory.parent / "copy" / "checkpoints"
    shutil.copytree(directory, copy)
    damage(copy / "2" / file)
    log.clear()
    position, state = restore(copy)
    assert_is(state, position)
    lines = [record.getMessage() for record in log if "is damaged" in record.getMessage()]
    noticed = position == 1
    assert noticed == bool(lines)
    if noticed:
        assert len(lines) == 1 and f"{copy}/2 is damaged: " in lines[0] and "\n" not in lines[0]
        assert saved(copy) == [1] and (copy.parent / "checkpoints-damaged" / "2").is_dir()
    shutil.rmtree(copy.parent)
    return noticed


def files(checkpoint: Path) -> list[str]:
    return [str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_to_any_file_is_noticed_or_harmless(
    kind: str, directory: Path, log: list[standard_logging.LogRecord]
) -> None:
    for file in files(directory / "2"):
        noticed = check_damage(directory, DAMAGES[kind], file, log)
        assert noticed or not file.startswith(ESSENTIAL), file


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_any_flipped_bit_is_noticed_or_harmless(
    seed: int, directory: Path, log: list[standard_logging.LogRecord]
) -> None:
    rng = np.random.default_rng(seed)
    for file in files(directory / "2"):
        for position in rng.uniform(size=20):
            check_damage(directory, flip(position), file, log)


def test_a_position_can_be_saved_again_after_its_checkpoint_was_damaged(directory: Path) -> None:
    for damaged in (["2"], ["2", "2.1"]):
        DAMAGES["zeroed"](directory / "2" / "meta" / "metadata")
        checkpoints = Checkpoints(directory, keep=2)
        assert checkpoints.restore_newest(target())[0] == 1
        checkpoints.save(2, on_devices(arrays(2)))
        checkpoints.close()
        assert_is(restore(directory)[1], 2)
        assert sorted(os.listdir(f"{directory}-damaged")) == damaged


def test_when_none_is_sound_the_user_decides(
    directory: Path, log: list[standard_logging.LogRecord]
) -> None:
    DAMAGES["emptied"](directory / "2" / "state" / "manifest.ocdbt")
    DAMAGES["deleted"](directory / "1" / "meta" / "metadata")
    for _ in range(2):  # starting again says the same
        log.clear()
        with pytest.raises(
            UserError, match="no checkpoint in .* is sound; .* remove that directory"
        ):
            restore(directory)
        assert ["is damaged" in record.getMessage() for record in log] == [True, True]
        assert saved(directory) == [1, 2]


def test_a_moved_checkpoint_is_not_taken_for_another_position(directory: Path) -> None:
    (directory / "2").rename(directory / "7")
    assert restore(directory)[0] == 1


# What needs a process of its own.


def child(name: str, *args: object, devices: int = 1, **environment: str) -> subprocess.Popen[str]:
    """Starts this file as a program that calls the function of that name."""
    return subprocess.Popen(
        [sys.executable, __file__, name, *map(str, args)],
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


def on_other_devices(two: str, directory: str) -> None:
    """Restores what was saved on another device count, saves, donates, takes digests."""
    checkpoints = Checkpoints(two, keep=2)
    newest, state = checkpoints.restore_newest(target())
    checkpoints.close()
    assert newest == 2 and state.params["half"].sharding.num_devices == len(jax.devices())
    assert_is(state, 2)
    checkpoints = Checkpoints(directory + "/saved", keep=2)
    checkpoints.save(2, state)
    checkpoints.close()
    save_and_donate(Path(directory + "/donated"))
    minor = min(2, len(jax.devices()))
    mesh = jax.make_mesh((len(jax.devices()) // minor, minor), ("a", "b"))
    for dtype in (np.float64, jnp.bfloat16):
        array = np.random.default_rng(0).normal(scale=50, size=(8, 4, 3)).astype(dtype)
        for spec in (P(), P(None, "a"), P(("a", "b"))):
            leaf = jax.device_put(array, NamedSharding(mesh, spec))
            assert leaf.dtype == array.dtype
            assert leaf_digests([leaf])[0] == {"0": slow_digest(array)}, (dtype, spec)


def test_other_device_counts(directory: Path, tmp_path: Path) -> None:
    devices = 1 if len(jax.devices()) == 8 else 8
    output(child("on_other_devices", directory, tmp_path, devices=devices, JAX_ENABLE_X64="1"))
    position, state = restore(tmp_path / "saved")
    assert position == 2 and state.params["half"].sharding.num_devices == len(jax.devices())
    assert_is(state, 2)


def fill_the_disk(directory: str, first_failures: str, then_failures: str) -> None:
    """Limits the size of files, as a full disk does, while it saves; prints what is on disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(directory, keep=1)
    fails = [False] + [True] * int(first_failures) + [False] + [True] * int(then_failures)
    for position, full in enumerate(fails):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024 if full else hard, hard))
        try:
            checkpoints.save(position, on_devices(arrays(position)))
            assert checkpoints.wait() == (0 if position < 3 else 3)
        except UserError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        sound = [path.name for path in Path(directory).iterdir() if path.name.isdigit()]
        print(position, sound)
    checkpoints.close()
    checkpoints = Checkpoints(directory, keep=1)
    assert_is(checkpoints.restore_newest(target())[1], int(sound[0]))
    checkpoints.save(99, on_devices(arrays(99)))
    checkpoints.close()
    print(os.listdir(directory))


def test_a_full_disk_is_survived_twice_and_ends_the_third_time(tmp_path: Path) -> None:
    lines, err = output(child("fill_the_disk", tmp_path / "c", 2, 3))
    assert lines[:5] == ["0 ['0']", "1 ['0']", "2 ['0']", "3 ['3']", "4 ['3']"]
    assert lines[5] == "5 ['3']"
    assert lines[6].startswith(f"3 saves in a row failed in {tmp_path}/c, the last at batch 6: ")
    assert "free some space there" in lines[6]
    assert lines[7:] == ["6 ['3']", "['99']"]
    warnings = [line for line in err if "was not saved" in line]
    assert [line.split("batch ")[1][0] for line in warnings] == ["1", "2", "4", "5"]
    assert all("Failed writing" in line or "File too large" in line for line in warnings)


def save_until_killed(directory: str, delay: str) -> None:
    """Goes on from the newest checkpoint; kills itself that many seconds after two saves more."""
    checkpoints = Checkpoints(directory, keep=2)
    position = 0
    if (newest := checkpoints.restore_newest(target())) is not None:
        position, state = newest
        assert_is(state, position)
    assert not list(Path(directory).glob("*tmp*")) or position == 0
    first = position
    while True:
        position += 1
        checkpoints.save(position, on_devices(arrays(position)))
        print(position - 1, flush=True)  # a save waits for the one before: that one is on disk
        if position == first + 3:
            threading.Timer(float(delay), os.kill, (os.getpid(), signal.SIGKILL)).start()


def test_kill_9_while_saving_loses_only_the_save_in_flight(tmp_path: Path) -> None:
    on_disk = 0
    for delay in (0.03, 0):  # the last one is sure to be in the middle of a save
        process = child("save_until_killed", tmp_path / "c", delay)
        out, err = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, err
        positions = [int(line) for line in out.split()]
        assert positions[0] >= on_disk and len(positions) >= 3
        on_disk = positions[-1]
    assert any(".orbax-checkpoint-tmp" in name for name in os.listdir(tmp_path / "c"))
    position, state = restore(tmp_path / "c")
    assert position >= on_disk
    assert_is(state, position)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
