"""train.py with everything of a run in a bucket: as on a disk, bit by bit, whatever happens."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tests.program as on_disk
from tests.emulator import BUCKET, Emulator, environment
from tests.program import ROOT, STEPS, Program


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    emulator = Emulator(tmp_path_factory.mktemp("bucket"))
    yield emulator
    emulator.kill()


@pytest.fixture(scope="module")
def in_bucket(start, emulator) -> Callable[..., Program]:
    """Starts the program where the bucket is."""
    return lambda *args, **options: start(*args, **(emulator.environment | options))


@pytest.fixture(scope="module")
def unanswered(in_bucket) -> Iterator[list[tuple[Program, str]]]:
    """Programs that wait for an answer while the other tests run, and what they will say."""
    with socket.socket() as nobody, socket.socket() as silent:
        nobody.bind(("127.0.0.1", 0))
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        yield [
            (in_bucket("gs://a-bucket/run", **environment(listener.getsockname()[1])), words)
            for listener, words in ((nobody, "Cannot connect"), (silent, "no answer within 60 s"))
        ]


@pytest.fixture(scope="module")
def stopped_and_continued(in_bucket, emulator) -> tuple[str, list[str]]:
    """The workdir of a run in the bucket that was stopped once, and what it printed."""
    workdir = f"gs://{BUCKET}/stopped"
    program = in_bucket(workdir)
    program.read_until(r"step 5/")
    program.send(signal.SIGTERM)
    assert program.wait(60) == 75, program.output
    said = [program.output]
    # What is there is all that is known of the run: every line up to the step that it was saved at.
    (step,) = (int(path.name) for path in emulator.path(f"{workdir}/checkpoints").iterdir())
    assert f"stopped at step {step} of {STEPS}, saved" in program.output
    lines = on_disk.metrics(emulator.path(workdir))
    assert [line["step"] for line in lines] == list(range(1, step + 1))
    program = in_bucket(workdir, tensorflow=True)  # which is used for TensorBoard's files, no more
    assert program.wait() == 0, program.output
    assert f"continuing after step {step}" in program.output
    return workdir, [*said, program.output]


def numbers(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what a clock says."""
    speed = "train/images_per_second"
    return [{k: v for k, v in x.items() if k != speed} for x in on_disk.metrics(workdir)]


def assert_equal_runs(workdir: Path, straight: Path) -> None:
    assert on_disk.digests(workdir, STEPS) == on_disk.digests(straight, STEPS)
    assert numbers(workdir) == numbers(straight)
    for name in ("classes.json", "evaluations.json"):
        assert json.loads((workdir / name).read_text()) == json.loads((straight / name).read_text())


def one_error(program: Program, timeout: float = 300) -> str:
    """The error, where a program ended with it and without a traceback."""
    assert program.wait(timeout) == 1, program.output
    assert "Traceback" not in program.output, program.output
    (line,) = (line for line in program.output.splitlines() if line.startswith("error: "))
    return line


@pytest.mark.docs
def test_a_run_that_was_stopped_is_bit_equal_to_one_on_a_disk(
    stopped_and_continued, straight, emulator
) -> None:
    workdir, said = stopped_and_continued
    assert_equal_runs(emulator.path(workdir), straight)
    assert said[1].splitlines()[-1].endswith(f"see {workdir}")
    # Nothing is left of probes, and one line tells of each thing: libraries have none of their own.
    names = {path.name for path in emulator.path(workdir).iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert len(events) == 1 and emulator.path(f"{workdir}/{events.pop()}").stat().st_size > 1000
    assert {name for name in names if not name.startswith("events")} == {
        "config.json",
        "classes.json",
        "evaluations.json",
        "metrics.jsonl",
        "per_class.json",
        "confusion.png",
    } | {"checkpoints"}
    drawn = emulator.path(f"{workdir}/confusion.png").read_bytes()
    assert drawn == (straight / "confusion.png").read_bytes()
    assert not any(word in text for text in said for word in ("Traceback", "WARNING", "gcsfs"))


@pytest.mark.slow
@pytest.mark.usefixtures("unanswered")  # these begin to wait
def test_what_is_in_a_bucket_is_evaluated_and_started_from(
    in_bucket, stopped_and_continued, straight, emulator, tmp_path
) -> None:
    workdir, _ = stopped_and_continued
    before = on_disk.metrics(straight)[-1]
    program = in_bucket(workdir, "--config.eval_only=True")
    assert program.wait() == 0, program.output
    last = on_disk.metrics(emulator.path(workdir))[-1]
    assert last["eval_only"] is True
    assert last["eval/loss"] == pytest.approx(before["eval/loss"], rel=1e-5)

    converted = f"gs://{BUCKET}/converted"
    files = [f"gs://{BUCKET}/w.safetensors", f"gs://{BUCKET}/w.pth"]
    back = str(tmp_path / "back.safetensors")
    # Every form, out and in.
    convert(emulator, *zip([workdir, converted, *files], [converted, *files, back], strict=True))
    assert emulator.path(converted).is_dir() and emulator.path(files[0]).is_file()
    expected = tmp_path / "straight.safetensors"
    convert(emulator, (str(straight), str(expected)))
    assert Path(back).read_bytes() == emulator.path(files[0]).read_bytes() == expected.read_bytes()

    flags = ("--config.eval_only=True", f"--config.init_from={files[1]}")
    program = in_bucket(tmp_path / "run", *flags)
    assert program.wait() == 0, program.output
    (line,) = on_disk.metrics(tmp_path / "run")
    assert line["eval/loss"] == last["eval/loss"]


def convert(emulator: Emulator, *pairs: tuple[str, str]) -> None:
    """Converts the first of each pair to the second, in one process."""
    program = (
        "import sys, convert_torch_weights\n"
        "for pair in zip(sys.argv[1::2], sys.argv[2::2]):\n"
        "    convert_torch_weights.main([pair[0], '--output', pair[1]])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *(path for pair in pairs for path in pair)],
        cwd=ROOT,
        env=os.environ | on_disk.WITHOUT_TENSORFLOW | emulator.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for source, output in pairs:
        assert f"input      {source}" in done.stdout and f"output     {output}\n" in done.stdout


@pytest.mark.slow
def test_damaged_and_unfinished_checkpoints_are_named_and_the_one_before_used(
    in_bucket, straight, emulator
) -> None:
    workdir = f"gs://{BUCKET}/damaged"
    program = in_bucket(workdir, "--config.checkpoint_every=5", "--config.steps=20")
    assert program.wait() == 0, program.output
    saved = emulator.path(f"{workdir}/checkpoints")
    # By their objects: on this disk the emulator keeps the folders of what was removed.
    objects = [file.relative_to(saved) for file in saved.rglob("*") if file.is_file()]
    assert {path.parts[0] for path in objects} == {"10", "15", "20"}
    # As a save that was cut off leaves it: objects, and no mark that they are all there.
    emulator.forget(f"{workdir}/checkpoints/20/commit_success.txt")
    largest = max((saved / "15/state/d").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    program = in_bucket(workdir)
    assert program.wait() == 0, program.output
    for words in (
        f"{workdir}/checkpoints/20 was never finished",
        f"{workdir}/checkpoints/15 is damaged: ",
        f"damaged checkpoints were moved to {workdir}/checkpoints-damaged",
        "continuing after step 10",
    ):
        assert program.output.count(words) == 1, program.output
    aside = emulator.path(f"{workdir}/checkpoints-damaged/15")
    assert (aside / largest.relative_to(saved / "15")).read_bytes() == content
    assert_equal_runs(emulator.path(workdir), straight)


@pytest.mark.slow
def test_a_storage_that_hangs_is_named_and_the_run_ends(in_bucket, emulator) -> None:
    """R14: it takes what is saved, and never answers."""
    flags = ("--config.stall_after=6", "--config.checkpoint_every=5")
    program = in_bucket(f"gs://{BUCKET}/hung", *flags, "--config.steps=5000", "--config.epochs=300")
    program.read_until("step 3/")
    emulator.suspend()
    try:
        assert program.wait(90) == 1, program.output
    finally:
        emulator.resume()
    assert re.search(
        r"nothing has happened for 0:\d\d:\d\d: waiting for the storage", program.output
    )
    assert "error: still waiting for the storage" in program.output
    assert "checkpoints/manager.py" in program.output  # the stacks


@pytest.mark.slow
def test_a_storage_that_dies_in_a_save_costs_no_step(in_bucket, straight, emulator) -> None:
    """Killed in the middle of a save, back after seconds, with what it had."""
    workdir = f"gs://{BUCKET}/killed"
    program = in_bucket(workdir, "--config.checkpoint_every=10")
    saving = emulator.path(f"{workdir}/checkpoints/20/state")
    deadline = time.monotonic() + 120
    while not saving.exists():
        assert time.monotonic() < deadline, program.output
        time.sleep(0.01)
    emulator.kill()
    time.sleep(5)
    emulator.start()
    code = program.wait(300)
    assert code == 0, program.output
    assert "Traceback" not in program.output
    assert_equal_runs(emulator.path(workdir), straight)


@pytest.mark.parametrize(
    "field", ["--workdir", pytest.param("--config.init_from", marks=pytest.mark.docs)]
)
def test_a_bucket_that_is_not_there_is_one_line_at_once(in_bucket, field, tmp_path) -> None:
    where = "gs://no-such-bucket/run"
    began = time.monotonic()
    if field == "--workdir":
        program = in_bucket(where)
    else:
        program = in_bucket(tmp_path / "run", f"{field}={where}")
    error = one_error(program, 60)
    assert "there is no bucket gs://no-such-bucket: mend its name, or create it" in error
    assert time.monotonic() - began < 60 and "compiled" not in program.output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_storage_that_does_not_answer_is_one_line_within_a_minute(unanswered) -> None:
    """Nobody listens; and somebody who takes requests and never answers."""
    for (program, words), limit in zip(unanswered, (50, 75), strict=True):
        error = one_error(program, limit)
        assert re.search(rf"gs://a-bucket cannot be reached \(.*{words}", error), error
        assert "is there a network" in error and "compiled" not in program.output


@pytest.mark.slow
def test_without_gcsfs_the_package_is_named(in_bucket, tmp_path) -> None:
    (tmp_path / "gcsfs.py").write_text("raise ImportError('No module named gcsfs')\n")
    shutil.copytree(on_disk.WITHOUT_TENSORFLOW["PYTHONPATH"], tmp_path, dirs_exist_ok=True)
    program = in_bucket("gs://a-bucket/run", tensorflow=True, PYTHONPATH=str(tmp_path))
    assert (
        "buckets need gcsfs" in (error := one_error(program, 60)) and "pip install gcsfs" in error
    )
