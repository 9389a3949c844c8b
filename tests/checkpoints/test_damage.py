"""Checkpoints that are damaged on disk, in every file and in every way."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stvit_jax.checkpoints.manager import Checkpoints
from stvit_jax.errors import UserError
from tests.checkpoints.states import arrays, assert_is, on_devices, restore, saved, target


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

# What Orbax's readers leave behind when one of them fails reaches nobody.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


def check_damage(
    directory: Path, damage: Callable[[Path], None], file: str, capsys: pytest.CaptureFixture
) -> bool:
    """Damages a file of checkpoint 2. True: noticed, and 1 restored. False: 2 as it was."""
    copy = directory.parent / "copy" / "checkpoints"
    shutil.copytree(directory, copy)
    damage(copy / "2" / file)
    position, state = restore(copy)
    assert_is(state, position)
    lines = capsys.readouterr().err.splitlines()
    noticed = position == 1
    assert noticed == bool(lines)
    if noticed:
        assert len(lines) == 2 and len(lines[0]) < 500
        assert f"{copy}/2 is damaged: " in lines[0] and "checkpoints-damaged" in lines[1]
        assert saved(copy) == [1] and (copy.parent / "checkpoints-damaged" / "2").is_dir()
    shutil.rmtree(copy.parent)
    return noticed


def files(checkpoint: Path) -> list[str]:
    return [str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_to_any_file_is_noticed_or_harmless(
    kind: str, directory: Path, capsys: pytest.CaptureFixture
) -> None:
    for file in files(directory / "2"):
        noticed = check_damage(directory, DAMAGES[kind], file, capsys)
        assert noticed or not file.startswith(ESSENTIAL), file


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_any_flipped_bit_is_noticed_or_harmless(
    seed: int, directory: Path, capsys: pytest.CaptureFixture
) -> None:
    rng = np.random.default_rng(seed)
    for file in files(directory / "2"):
        for position in rng.uniform(size=20):
            check_damage(directory, flip(position), file, capsys)


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
    directory: Path, capsys: pytest.CaptureFixture
) -> None:
    DAMAGES["emptied"](directory / "2" / "state" / "manifest.ocdbt")
    DAMAGES["deleted"](directory / "1" / "meta" / "metadata")
    for _ in range(2):  # starting again says the same
        with pytest.raises(
            UserError, match="no checkpoint in .* is sound; .* remove that directory"
        ):
            restore(directory)
        lines = capsys.readouterr().err.splitlines()
        assert ["is damaged" in line for line in lines] == [True, True]
        assert saved(directory) == [1, 2]


def test_a_moved_checkpoint_is_not_taken_for_another_position(directory: Path) -> None:
    (directory / "2").rename(directory / "7")
    assert restore(directory)[0] == 1
