"""Where numbers go: lines stay whole and ordered, whoever else writes to the workdir."""

from pathlib import Path

import pytest

from stvit_jax.errors import UserError
from stvit_jax.training.metrics import MetricWriter
from stvit_jax.training.workdir import make_workdir
from tests.program import metrics


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are looked at in test_train."""
    monkeypatch.setattr("stvit_jax.training.metrics._open_tensorboard", lambda workdir: None)


def test_a_continuation_removes_later_and_half_written_lines(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(step, step / 10, {"train/loss": 1.0 / step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "ev')
    writer = MetricWriter(tmp_path, 2)
    assert writer.find(2, "train/loss") == {"step": 2, "epoch": 0.2, "train/loss": 0.5}
    assert writer.find(3, "train/loss") is None and writer.find(2, "eval/top1") is None
    writer.write(3, 0.3, {"train/loss": 9.0})
    writer.close()
    assert [line["train/loss"] for line in metrics(tmp_path)] == [1.0, 0.5, 9.0]


def test_a_run_that_is_evaluated_meanwhile_keeps_its_lines(tmp_path: Path) -> None:
    training = MetricWriter(tmp_path, 0)
    training.write(1, 0.1, {"train/loss": 1.0})
    evaluating = MetricWriter(tmp_path)
    evaluating.write(1, 0.0, {"eval/top1": 0.5})
    evaluating.close()
    training.write(2, 0.2, {"train/loss": 2.0})
    training.close()
    assert [line["step"] for line in metrics(tmp_path)] == [1, 1, 2]


def test_an_evaluation_of_its_own_does_not_stand_for_the_runs(tmp_path: Path) -> None:
    """It may be about other data, and the run's own at this step may still be due."""
    writer = MetricWriter(tmp_path)
    writer.write(7, 0.5, {"eval/top1": 0.1})
    writer.write(7, 0.5, {"eval/top1": 0.9, "eval_only": True})
    writer.write(8, 0.6, {"eval/top1": 0.9, "eval_only": True})
    assert writer.find(7, "eval/top1")["eval/top1"] == 0.1
    assert writer.find(8, "eval/top1") is None
    writer.close()


def test_a_workdir_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--workdir .*file/run cannot be written: Not a directory"):
        make_workdir(tmp_path / "file" / "run")
