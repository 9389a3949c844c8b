"""train.py as a process where something around it is at fault: one line, or it goes on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.program import NARROW, ROOT, WITHOUT_TENSORFLOW, Program, metrics, values

CLASSES = ("apple", "bread", "cake")
ENDLESS = ("--config.epochs=40000", "--config.steps=30000", "--config.checkpoint_every=100000")
# Root reads and writes whatever it likes, but for these capabilities.
PLAIN_USER = (
    "setpriv",
    "--bounding-set=-dac_override,-dac_read_search",
    "--inh-caps=-dac_override,-dac_read_search",
)


def write_folders(root: Path, classes: tuple[str, ...] = CLASSES) -> Path:
    """Class folders whose pictures tell the class, by its position in `classes`."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 60, (32, 32, 3), np.uint8)
                pixels[..., label] += 180
                Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """The flags of a short run on class folders, before others; programs are compiled once."""

    def flags(workdir: Path, folders: Path, *more: str) -> list[str]:
        return [
            f"--workdir={workdir}",
            *NARROW,
            "--config.data.source=folder",
            f"--config.data.dir={folders}",
            "--config.data.workers=0",
            "--config.batch_size=16",
            "--config.epochs=4",
            "--config.warmup_epochs=0",
            "--config.steps=4",
            "--config.log_every=2",
            "--config.eval_every_epochs=0",
            *more,
        ]

    return flags


@pytest.fixture(scope="module")
def start(flags, compiled: dict[str, str]) -> Callable[..., Program]:
    def start(workdir: Path, folders: Path, *more: str, **options: Any) -> Program:
        return Program(workdir, *flags(workdir, folders, *more), **(compiled | options))

    return start


@pytest.fixture(scope="module")
def trained(start, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a finished run that has learned to tell the classes apart."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    more = ("--config.learning_rate=0.03", "--config.epochs=60", "--config.steps=120")
    program = start(workdir, folders, *more, "--config.ema_decay=0")
    assert program.wait() == 0, program.output
    assert values(workdir, "eval/top1")[120] > 0.9
    return workdir


def evaluate(start, workdir: Path, folders: Path, *more: str, **options: Any) -> Program:
    flags = ("--config.eval_only=True", "--config.ema_decay=0")
    return start(workdir, folders, *flags, *more, **options)


def run_as_user(arguments: list[str], compiled: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [*PLAIN_USER, sys.executable, "train.py", "--config", "configs/digits.py"]
    return subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=os.environ | WITHOUT_TENSORFLOW | compiled,
        capture_output=True,
        text=True,
        timeout=300,
    )


def one_error(program: Program) -> str:
    """The error, where a program ended with it and without a traceback."""
    assert program.wait() == 1, program.output
    assert "Traceback" not in program.output, program.output
    (line,) = (line for line in program.output.splitlines() if line.startswith("error: "))
    return line


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "SIGHUP",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("SIGUSR1", "SIGUSR2", "SIGXCPU")),
    ],
)
def test_every_signal_that_asks_to_stop_saves(start, folders, tmp_path, name) -> None:
    program = start(tmp_path, folders, *ENDLESS)
    program.read_until(r"step 4/")
    program.send(signal.Signals[name])
    assert program.wait(60) == 75, program.output
    assert f"{name}: saving after this step" in program.output
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert f"stopped at step {saved.name} of 30000, saved" in program.output


@pytest.mark.slow
def test_data_that_hang_do_not_keep_a_run_from_stopping(start, folders, tmp_path) -> None:
    program = start(tmp_path, folders, *ENDLESS, "--config.data.workers=1")
    program.read_until(r"step 4/")
    workers = [pid for pid in program.children() if "spawn_main" in command_of(pid)]
    assert len(workers) == 1
    os.kill(workers[0], signal.SIGSTOP)
    time.sleep(3)  # what was loaded before is used up, and the run waits
    program.send(signal.SIGTERM)
    assert program.wait(30) == 75, program.output
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert f"stopped at step {saved.name} of 30000, saved" in program.output
    assert not Path(f"/proc/{workers[0]}").exists()


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


@pytest.mark.slow
def test_a_run_under_nohup_outlives_its_terminal(start, folders, tmp_path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited
    try:
        program = start(tmp_path, folders, "--config.epochs=60", "--config.steps=100")
    finally:
        signal.signal(signal.SIGHUP, before)
    program.read_until(r"step 4/")
    program.send(signal.SIGHUP)
    assert program.wait() == 0, program.output
    assert "done: step 100 of 100" in program.output


@pytest.mark.slow
def test_nobody_reads_the_console_any_more(flags, compiled, folders, tmp_path) -> None:
    """As `train.py | head -1` and `train.py > /dev/full`."""
    for where in ("| head -1", "> /dev/full"):
        workdir = tmp_path / where[0].replace("|", "pipe").replace(">", "full")
        command = [sys.executable, "train.py", "--config", "configs/digits.py"]
        text = " ".join(f"'{part}'" for part in (*command, *flags(workdir, folders)))
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {text} {where}"],
            cwd=ROOT,
            env=os.environ | WITHOUT_TENSORFLOW | compiled,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        assert (workdir / "checkpoints" / "4").is_dir() and 4 in values(workdir, "eval/top1")


@pytest.mark.slow
def test_a_log_without_room_ends_nothing(start, folders, tmp_path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    program = start(tmp_path, folders)
    assert program.wait() == 0, program.output
    assert program.output.count("metrics.jsonl cannot be written (No space left on device)") == 1
    assert (tmp_path / "checkpoints" / "4").is_dir()


@pytest.mark.slow
def test_a_console_that_lacks_a_letter_ends_nothing(start, tmp_path) -> None:
    folders = write_folders(tmp_path / "data", ("pâté", "寿司", "cake"))
    (folders / "val" / "寿司" / "00.png").write_bytes(b"no image")
    program = start(tmp_path / "run", folders, PYTHONIOENCODING="ascii:strict")
    assert program.wait() == 0, program.output
    assert "\\u5bff\\u53f8/00.png does not decode" in program.output


@pytest.mark.slow
def test_the_result_of_a_workdir_that_may_only_be_read_is_said(
    flags, compiled, folders, trained, tmp_path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    before = (workdir / "metrics.jsonl").read_text()
    subprocess.run(["chmod", "-R", "a-w", workdir], check=True)
    more = ("--config.eval_only=True", "--config.ema_decay=0")
    done = run_as_user(flags(workdir, folders, *more), compiled)
    assert done.returncode == 0, done.stderr
    assert "evaluated: raw top-1" in done.stdout and "on the console only" in done.stderr
    done = run_as_user(flags(workdir, folders, "--config.steps=6"), compiled)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    subprocess.run(["chmod", "-R", "u+w", workdir], check=True)
    assert (workdir / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_labels_keep_their_meaning(start, folders, trained, tmp_path) -> None:
    """Other names are refused; the same ones in another order are put right."""
    same = evaluate(start, tmp_path / "same", folders, f"--config.init_from={trained}")
    assert same.wait() == 0, same.output
    accuracy = metrics(tmp_path / "same")[0]["eval/top1"]

    # The first class is called something that sorts last: every label changes.
    renamed = write_folders(tmp_path / "renamed", ("zucchini", "bread", "cake"))
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    fault = one_error(evaluate(start, workdir, renamed))
    assert "its label 0 is 'apple', that of the data 'bread'" in fault
    more = ("--config.learning_rate=0.03", "--config.epochs=60", "--config.steps=130")
    fault = one_error(start(workdir, renamed, *more, "--config.ema_decay=0"))
    assert "missing: apple; new: zucchini" in fault
    fewer = write_folders(tmp_path / "fewer", CLASSES[:2])
    fault = one_error(start(workdir, fewer, *more, "--config.ema_decay=0"))
    assert "the data have 2 classes, and not the 3" in fault and "missing: cake" in fault

    # A run of before names were kept has none to compare; with them in another order, they count.
    names = workdir / "classes.json"
    names.unlink()
    program = evaluate(start, workdir, renamed)
    assert program.wait() == 0, program.output
    assert metrics(workdir)[-1]["eval/top1"] < 0.5 < accuracy
    names.write_text('["apple", "bread", "cake"]')
    other_names = write_folders(tmp_path / "numbers", ("0", "1", "2"))
    program = evaluate(start, workdir, other_names)
    assert program.wait() == 0, program.output
    assert "no name is shared, so label by label they are taken for the same" in program.output
    assert metrics(workdir)[-1]["eval/top1"] == accuracy


@pytest.mark.slow
def test_a_head_of_the_same_classes_in_another_order_is_put_right(
    start, folders, trained, tmp_path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    (workdir / "classes.json").write_text('["cake", "apple", "bread"]')
    program = evaluate(start, workdir, folders)
    assert program.wait() == 0, program.output
    assert "the same classes in another order" in program.output
    # The names in the file are wrong, so the mapped head is, too: none is right any more.
    assert metrics(workdir)[-1]["eval/top1"] < 0.5


@pytest.mark.slow
def test_a_run_without_its_recipe_is_not_continued(start, folders, trained, tmp_path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    (workdir / "config.json").unlink()
    fault = one_error(start(workdir, folders, "--config.learning_rate=0.5"))
    assert "no config.json to tell their recipe: bring it back" in fault
    (workdir / "config.json").mkdir()
    fault = one_error(start(workdir, folders))
    assert "config.json cannot be read (Is a directory)" in fault


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"JAX_PLATFORMS": "tpu"}, "there are no devices for JAX_PLATFORMS='tpu'"),
        ({"JAX_PLATFORMS": "no_such"}, "there are no devices for JAX_PLATFORMS='no_such'"),
        ({"JAX_DISABLE_JIT": "1"}, "JAX_DISABLE_JIT is set"),
    ],
)
def test_a_jax_that_cannot_train_is_one_line(start, folders, tmp_path, environment, words) -> None:
    fault = one_error(start(tmp_path, folders, **environment))
    assert words in fault
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.docs
def test_a_result_from_nothing_is_an_error(start, folders, trained, tmp_path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(folders, copy)
    for path in (copy / "val").rglob("*.png"):
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    fault = one_error(evaluate(start, tmp_path / "e", copy, f"--config.init_from={trained}"))
    assert "none of the 12 images to evaluate on can be read" in fault


def test_nothing_to_evaluate_is_said_before_anything_is_compiled(start, folders, tmp_path) -> None:
    fault = one_error(evaluate(start, tmp_path / "new", folders))
    assert "there is no checkpoint in" in fault and "--config.init_from=PATH" in fault
    assert not (tmp_path / "new").exists()


def test_a_run_that_cannot_begin_to_save_ends_at_once(start, folders, tmp_path) -> None:
    tmp_path.joinpath("checkpoints").touch()
    began = time.monotonic()
    one_error(start(tmp_path, folders))
    assert time.monotonic() - began < 120  # library threads waited for 300 s
