"""Checkpoints: bits, donation, kill -9, other device counts.

What ends a process or needs another device count runs this file as a program.
"""

import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stvit_jax.checkpoints.digests import leaf_digests
from stvit_jax.checkpoints.manager import Checkpoints
from stvit_jax.errors import UserError
from tests.checkpoints.states import (
    arrays,
    assert_is,
    child,
    on_devices,
    output,
    restore,
    saved,
    slow_digest,
    target,
)


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
        newest, state, _ = checkpoints.restore_newest(target())
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
    tmp_path: Path, log: list, capsys: pytest.CaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.wait() is None
    for position in (10, 20, 30, 40):
        checkpoints.save(position, on_devices(arrays(position)))
    checkpoints.save(40, on_devices(arrays(1)))
    checkpoints.close()
    assert saved(tmp_path / "c") == [30, 40] and log == []
    assert_is(restore(tmp_path / "c")[1], 40)


def test_a_state_that_is_not_finite_is_not_saved(directory: Path, tmp_path: Path) -> None:
    state = arrays(3)
    state.params["stem"]["kernel"][0, 0, 0, 0] = np.nan
    checkpoints = Checkpoints(directory, keep=1)
    with pytest.raises(UserError, match="batch 3 .* non-finite values in params/stem/kernel;") as e:
        checkpoints.save(3, on_devices(state))
    assert "the newest is 2; lower learning_rate" in str(e.value)
    checkpoints.close()
    assert saved(directory) == [1, 2]
    assert restore(directory)[0] == 2
    checkpoints = Checkpoints(tmp_path / "new", keep=1)
    with pytest.raises(UserError, match="there is none from before"):
        checkpoints.save(3, on_devices(state))
    checkpoints.close()


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


def test_nothing_but_damage_is_logged(
    tmp_path: Path, log: list, capsys: pytest.CaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(1, on_devices(arrays(1)))
    checkpoints.save(2, on_devices(arrays(2)))
    checkpoints.restore_newest(target())
    checkpoints.close()
    captured = capsys.readouterr()
    assert (log, captured.out, captured.err) == ([], "", "")


def on_other_devices(two: str, directory: str) -> None:
    """Restores what was saved on another device count, saves, donates, takes digests."""
    checkpoints = Checkpoints(two, keep=2)
    newest, state, _ = checkpoints.restore_newest(target())
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
    output(
        child(
            __file__, "on_other_devices", directory, tmp_path, devices=devices, JAX_ENABLE_X64="1"
        )
    )
    position, state = restore(tmp_path / "saved")
    assert position == 2 and state.params["half"].sharding.num_devices == len(jax.devices())
    assert_is(state, 2)


def save_until_killed(directory: str, delay: str) -> None:
    """Goes on from the newest checkpoint; kills itself that many seconds after two saves more."""
    checkpoints = Checkpoints(directory, keep=2)
    position = 0
    if (newest := checkpoints.restore_newest(target())) is not None:
        position, state, _ = newest
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
        process = child(__file__, "save_until_killed", tmp_path / "c", delay)
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
