"""Where numbers go: lines stay whole and ordered, whoever else writes to the workdir."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stvit_jax.training.metrics import MetricWriter, keep_lines
from tests.program import metrics


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are looked at in test_train."""
    monkeypatch.setattr(MetricWriter, "_open_tensorboard", lambda self, workdir: None)


def write(workdir: Path, *lines: tuple[int, dict]) -> None:
    writer = MetricWriter(workdir)
    for step, line in lines:
        writer.write(step, step / 10, line)
    writer.close()


def test_a_continuation_removes_later_and_half_written_lines(tmp_path: Path) -> None:
    write(tmp_path, *((step, {"train/loss": 1.0 / step}) for step in (1, 2, 3)))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "ev')
    keep_lines(tmp_path, 2, evaluation=True)
    write(tmp_path, (3, {"train/loss": 9.0}))
    assert [line["train/loss"] for line in metrics(tmp_path)] == [1.0, 0.5, 9.0]


def test_an_evaluation_that_will_be_repeated_has_no_two_lines(tmp_path: Path) -> None:
    write(tmp_path, (2, {"train/loss": 1.0}), (2, {"eval/top1": 0.5}))
    keep_lines(tmp_path, 2, evaluation=True)
    assert len(metrics(tmp_path)) == 2
    keep_lines(tmp_path, 2, evaluation=False)
    assert [line.get("train/loss") for line in metrics(tmp_path)] == [1.0]


def test_lines_of_others_stay_and_garbage_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    notes = b'{"note": "moved to node 7"}\n[1, 2]\n{"step": "three"}\n'
    garbage = b"\xff\xfe\n\n" + b"[" * 100_000 + b"\n" + b'{"step": 1}'
    path.write_bytes(b'{"step": 1, "train/loss": 3}\n' + notes + garbage)
    keep_lines(tmp_path, 1, evaluation=True)
    assert path.read_bytes() == b'{"step": 1, "train/loss": 3}\n' + notes


def test_a_run_that_is_evaluated_meanwhile_keeps_its_lines(tmp_path: Path) -> None:
    training = MetricWriter(tmp_path)
    training.write(1, 0.1, {"train/loss": 1.0})
    evaluating = MetricWriter(tmp_path)
    evaluating.write(1, 0.0, {"eval/top1": 0.5}, eval_only=True)
    evaluating.close()
    training.write(2, 0.2, {"train/loss": 2.0})
    training.close()
    assert [line["step"] for line in metrics(tmp_path)] == [1, 1, 2]
    keep_lines(tmp_path, 1, evaluation=False)  # it is not one of the run
    assert metrics(tmp_path)[1] == {"step": 1, "epoch": 0.0, "eval/top1": 0.5, "eval_only": True}


def test_a_log_that_cannot_be_written_is_said_once(tmp_path: Path, capsys) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    keep_lines(tmp_path, 1, evaluation=True)
    write(tmp_path, (1, {"train/loss": 1.0}), (2, {"train/loss": 1.0}))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "Is a directory" in said[0]
    (tmp_path / "metrics.jsonl").rmdir()
    write(tmp_path, (3, {"train/loss": 1.0}))
    assert [line["step"] for line in metrics(tmp_path)] == [3]


def test_a_line_after_half_a_line_stands_by_itself(tmp_path: Path) -> None:
    """A limit on the size of files, as a full disk, takes a part of a line."""
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from stvit_jax.training.metrics import MetricWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "MetricWriter._open_tensorboard = lambda self, workdir: None\n"
        "writer = MetricWriter(Path(sys.argv[1]))\n"
        "for step, size in enumerate((10**6, 50, 50, 10**6)):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))\n"
        "    writer.write(step, 0.0, {'train/loss': 1.0})\n"
        "writer.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("lines are missing") == 1, done.stderr
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if line.endswith("}")] == [0, 3]
