"""Folders that cannot be written, that vanish, disks that are full: said in lines, and survived.

What limits a process, or has to end by itself, runs this file as a program.
"""

import os
import resource
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from stvit_jax.checkpoints.manager import Checkpoints
from stvit_jax.errors import UserError
from tests.checkpoints.states import (
    abstract,
    arrays,
    assert_is,
    child,
    on_devices,
    output,
    restore,
    saved,
    target,
)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/checkpoints: Not a directory; .* another workdir"):
        Checkpoints(tmp_path / "file" / "checkpoints", keep=1)


def use(directory: str) -> None:
    """Restores and saves; prints what is wrong."""
    try:
        checkpoints = Checkpoints(directory, keep=2)
        print(checkpoints.restore_newest(target())[0])
        checkpoints.close()
    except UserError as error:
        print(error)


def test_a_directory_that_cannot_be_written_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "read-only").mkdir(mode=0o555)
    for name, reason in {"file": "File exists", "read-only": "Permission denied"}.items():
        lines, err = output(child(__file__, "use", tmp_path / name, rights=False))
        assert err == [] and lines == [
            f"checkpoints cannot be kept in {tmp_path / name}: {reason}; make it a directory that "
            "can be written, or use another workdir"
        ]


def test_what_may_not_be_read_is_not_damaged(directory: Path) -> None:
    (directory / "2" / "meta").chmod(0)
    lines, err = output(child(__file__, "use", directory, rights=False))
    assert err == [] and lines == [f"checkpoint {directory}/2 cannot be read: Permission denied"]
    assert saved(directory) == [1, 2]


def test_damaged_ones_that_cannot_be_moved_are_an_error(directory: Path) -> None:
    (directory / "2" / "meta" / "metadata").unlink()
    directory.parent.chmod(0o555)
    lines, err = output(child(__file__, "use", directory, rights=False))
    directory.parent.chmod(0o755)
    assert len(err) == 1 and f"{directory}/2 is damaged" in err[0]
    assert lines[0].startswith(f"damaged checkpoints cannot be moved to {directory}-damaged: Perm")


def test_a_directory_that_vanishes_is_made_anew_and_that_is_said(
    directory: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoints = Checkpoints(directory, keep=2)
    shutil.rmtree(directory)
    assert checkpoints.wait() is None
    for position in (2, 3):
        checkpoints.save(position, on_devices(arrays(position)))
        assert checkpoints.wait() == position
    checkpoints.close()
    said = capsys.readouterr().err
    assert said == f"{directory} had vanished with all checkpoints; it is made anew\n"
    assert restore(directory)[0] == 3


def replace_the_directory(directory: str) -> None:
    """Puts a file where the checkpoints were, and goes on until saving is given up."""
    checkpoints = Checkpoints(directory, keep=1)
    checkpoints.save(1, on_devices(arrays(1)))
    checkpoints.wait()
    shutil.rmtree(directory)
    Path(directory).touch()
    for position in (2, 3, 4):
        try:
            checkpoints.save(position, on_devices(arrays(position)))
            checkpoints.wait()
        except UserError as error:
            print(error)
    checkpoints.close()


def test_a_program_whose_saves_failed_early_ends(tmp_path: Path) -> None:
    """Threads that wait for folders that were never created would hold it for five minutes."""
    lines, err = output(child(__file__, "replace_the_directory", tmp_path / "c"))
    assert err == [
        f"checkpoint of batch {position} was not saved: Not a directory; going on, no other is "
        "there"
        for position in (2, 3)
    ]
    assert len(lines) == 1 and lines[0].startswith("3 saves in a row failed")


MANY = 200  # arrays, as a network has


def fail_noisily(directory: str) -> None:
    """Fails to write many arrays, then to read them."""
    # Noise, which does not compress: the file of any array is larger than the limit, however many
    # files the arrays are shared out to.
    noise = np.random.default_rng(0).random((MANY, 2**14), np.float32)
    state = {str(i): jnp.asarray(row) for i, row in enumerate(noise)}
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(directory, keep=2)
    for position, limit in ((1, hard), (2, 50_000), (3, hard)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        checkpoints.save(position, state)
        checkpoints.wait()
    for file in Path(directory, "3", "state").rglob("d/*"):
        os.truncate(file, 0)
    assert checkpoints.restore_newest(abstract(state))[0] == 1
    checkpoints.close()


def test_failures_are_one_line_each_however_many_arrays(tmp_path: Path) -> None:
    lines, err = output(child(__file__, "fail_noisily", tmp_path / "c"))
    assert lines == [] and len(err) == 3, err
    assert err[0].startswith("checkpoint of batch 2 was not saved: File too large; going on")
    assert err[1].startswith(f"checkpoint {tmp_path}/c/3 is damaged: ") and len(err[1]) < 500
    assert err[2] == f"damaged checkpoints were moved to {tmp_path}/c-damaged"


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
    lines, err = output(child(__file__, "fill_the_disk", tmp_path / "c", 2, 3))
    assert lines[:5] == ["0 ['0']", "1 ['0']", "2 ['0']", "3 ['3']", "4 ['3']"]
    assert lines[5] == "5 ['3']"
    assert lines[6].startswith(f"3 saves in a row failed in {tmp_path}/c, the last at batch 6: ")
    assert "free some space there" in lines[6]
    assert lines[7:] == ["6 ['3']", "['99']"]
    failed, left = (1, 2, 4, 5), (0, 0, 3, 3)
    assert err == [
        f"checkpoint of batch {position} was not saved: File too large; going on, the one of batch "
        f"{newest} is in place"
        for position, newest in zip(failed, left, strict=True)
    ]


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
