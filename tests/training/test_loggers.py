"""What follows a run: services shaped like wandb, which never end it, and TensorBoard's start."""

import json
import os
import re
import sys
import textwrap
import zlib
from pathlib import Path

import pytest

from stvit_jax.training import loggers
from tests.program import WITHOUT_TENSORFLOW, metrics, values

# A service as trackio is, on a disk; each fault is one that such a service has.
SERVICE = """
    import json, pathlib, time
    FAULT = {fault!r}
    lines = []
    def init(project, name=None, config=None, resume=None):
        if FAULT == "init": raise ConnectionError("no network")
        lines.append([project, name, config["batch_size"], resume])
    def log(metrics, step=None):
        if FAULT == "log": raise RuntimeError("quota")
        if FAULT == "hang": time.sleep(600)
        lines.append([step, metrics])
    def finish():
        pathlib.Path(__file__).with_name("service.json").write_text(json.dumps(lines))
"""


def service(folder: Path, fault: str = "") -> Path:
    """A folder to import `trackio` from."""
    folder.mkdir(exist_ok=True)
    (folder / "trackio.py").write_text(textwrap.dedent(SERVICE.format(fault=fault)))
    return folder


def begin(monkeypatch, folder: Path, workdir: Path, fault: str = "") -> loggers.Logger:
    workdir.mkdir(exist_ok=True)
    monkeypatch.syspath_prepend(str(service(folder, fault)))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    return loggers.Logger("trackio", "p", {"batch_size": 64}, workdir)


def test_everything_arrives(monkeypatch, tmp_path: Path) -> None:
    logger = begin(monkeypatch, tmp_path / "service", tmp_path / "run")
    logger.log({"train/loss": 2.0}, 1)
    logger.log({"eval/top1": 0.5}, 2)
    logger.finish()
    # Known by its name alone, as trackio knows runs: another folder of this name is another run.
    name = f"run-{zlib.crc32(str(tmp_path / 'run').encode()):08x}"
    assert json.loads((tmp_path / "service" / "service.json").read_text()) == [
        ["p", name, 64, "allow"],
        [1, {"train/loss": 2.0}],
        [2, {"eval/top1": 0.5}],
    ]


@pytest.mark.parametrize("fault", ["init", "log", "hang", "missing"])
def test_a_fault_is_said_once(fault: str, monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(loggers, "PATIENCE", 1.0)
    if fault == "missing":
        logger = loggers.Logger("no_such_service", "p", {}, tmp_path)
    else:
        logger = begin(monkeypatch, tmp_path / "service", tmp_path / "run", fault)
    for step in range(3):
        logger.log({"train/loss": 2.0}, step)
    logger.finish()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    words = {
        "init": "(ConnectionError: no network); metrics.jsonl goes on",
        "log": "(RuntimeError: quota); metrics.jsonl goes on",
        "hang": "did not end in 1 s; metrics.jsonl has everything",
        "missing": "pip install no_such_service); metrics.jsonl goes on",
    }
    assert said[0].endswith(words[fault])


@pytest.mark.slow
def test_a_run_is_followed_by_wandb(start, tmp_path: Path) -> None:
    """The package itself, which keeps what it would send; a run that goes on is the same there."""
    workdir = tmp_path / "run"
    for steps in (2, 3):
        flags = f"--config.steps={steps}", "--config.logger=wandb"
        program = start(workdir, *flags, WANDB_MODE="offline")
        assert program.wait() == 0, program.output
        assert "no more metrics" not in program.output and "did not end" not in program.output
    kept = sorted(workdir.glob("wandb/offline-run-*/*.wandb"))
    own = f"run-{zlib.crc32(str(workdir).encode()):08x}"
    assert [file.name for file in kept] == [f"run-{own}.wandb"] * 2
    content = b"".join(file.read_bytes() for file in kept)
    for loss in values(workdir, "train/loss").values():
        assert f"{loss}".encode() in content


@pytest.mark.slow
def test_a_service_that_fails_ends_no_run(start, tmp_path: Path) -> None:
    folder = service(tmp_path / "service", "log")
    flags = "--config.steps=3", "--config.logger=trackio"
    where = f"{folder}{os.pathsep}{WITHOUT_TENSORFLOW['PYTHONPATH']}"
    program = start(tmp_path / "run", *flags, tensorflow=True, PYTHONPATH=where)
    assert program.wait() == 0, program.output
    said = "no more metrics to trackio (RuntimeError: quota); metrics.jsonl goes on"
    assert program.output.count(said) == 1, program.output
    assert list(values(tmp_path / "run", "train/loss")) == [1, 2, 3]


@pytest.mark.docs
def test_a_run_is_followed_and_shown(start, tmp_path: Path) -> None:
    """The real program, with TensorBoard, which shows its fields and first inputs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    folder = service(tmp_path / "service")
    program = start(
        tmp_path / "run",
        "--config.steps=2",
        "--config.logger=trackio",
        tensorflow=True,
        PYTHONPATH=str(folder),
    )
    assert program.wait() == 0, program.output
    text = (folder / "service.json").read_text()
    assert re.search(r'"stvit_jax", "run-[0-9a-f]{8}", 64, "allow"', text)
    for line in metrics(tmp_path / "run"):
        for key in line.keys() - {"step", "epoch"}:
            assert f'"{key}": {line[key]}' in text
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    plugins = {
        tag: events.SummaryMetadata(tag).plugin_data.plugin_name for tag in events.Tags()["tensors"]
    }
    images = [tag for tag, plugin in plugins.items() if plugin == "images"]
    assert images and images[0].startswith("inputs")
    encoded = events.Tensors(images[0])[0].tensor_proto.string_val
    assert encoded[:2] == [b"32", b"32"] and len(encoded) > 3 and len(set(encoded[2:])) > 3
    assert any(plugin == "text" and tag.startswith("config") for tag, plugin in plugins.items())
    assert "hparams" in {
        value.metadata.plugin_data.plugin_name
        for file in (tmp_path / "run").glob("events.*")
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    }
