"""The folder of a run: writable or refused, its files replaced whole, its state of evaluations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stvit_jax.errors import UserError
from stvit_jax.training import workdir
from stvit_jax.training.workdir import Evaluations


def test_a_workdir_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--workdir .*file/run cannot be written: Not a directory"):
        workdir.make(tmp_path / "file" / "run")


def test_a_workdir_that_takes_no_more_is_named(tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from stvit_jax.training import workdir\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))\n"
        "workdir.make(Path(sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert "cannot be written: File too large; make room" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    path = tmp_path / "config.json"
    workdir.replace(path, "before")
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from stvit_jax.training import workdir\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, -1))\n"
        "workdir.replace(Path(sys.argv[1]), 'after' * 100)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert f"{path} cannot be written: File too large" in done.stderr
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["config.json"]
    workdir.replace(path, "after")
    assert path.read_text() == "after"


def test_evaluations_are_known_after_a_restart_up_to_the_step_it_goes_on_from(tmp_path) -> None:
    done = Evaluations(tmp_path)
    assert done.of(5) is None
    done.add(5, {"eval/top1": 0.5})
    done.add(10, {"eval/top1": 0.7})
    again = Evaluations(tmp_path)
    assert again.of(10) == {"eval/top1": 0.7}
    again.forget_after(5)
    assert again.of(5) == {"eval/top1": 0.5} and again.of(10) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"5": 3}', "[" * 100_000, "\x00\xff"])
def test_a_state_that_is_none_of_ours_counts_as_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / workdir.EVALUATIONS).write_bytes(content.encode("latin-1"))
    done = Evaluations(tmp_path)
    done.forget_after(3)
    assert done.of(5) is None
    done.add(5, {"eval/top1": 0.5})
    assert json.loads((tmp_path / workdir.EVALUATIONS).read_text()) == {"5": {"eval/top1": 0.5}}


def test_checkpoints_are_folders_with_numbers(tmp_path: Path) -> None:
    assert not workdir.has_checkpoints(tmp_path)
    (tmp_path / "checkpoints" / "notes").mkdir(parents=True)
    assert not workdir.has_checkpoints(tmp_path)
    (tmp_path / "checkpoints" / "12").mkdir()
    assert workdir.has_checkpoints(tmp_path)
