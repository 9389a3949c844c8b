"""R9, R13, R14: nothing waits for ever, and nobody writes where another one does."""

import contextlib
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from stvit_jax.training.owner import Claim, Owner
from stvit_jax.training.watchdog import Watchdog
from tests.program import NARROW, Processes, assert_equal_runs

IMPATIENT = "--config.stall_after=6"
LONG = ("--config.steps=20000", "--config.epochs=1000", "--config.eval_every_epochs=0")


def workers_of(program) -> list[int]:
    return [
        pid
        for pid in program.children()
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


@pytest.mark.docs
def test_r14_a_loader_that_hangs_is_named_and_the_last_step_saved(start, straight, tmp_path):
    flags = (IMPATIENT, "--config.data.workers=2")
    program = start(tmp_path, *flags, *LONG)
    program.read_until("step 4/")
    for pid in workers_of(program):
        os.kill(pid, signal.SIGSTOP)
    assert program.wait(60) == 1, program.output
    said = r"nothing has happened for 0:00:\d\d: waiting for the data of loader worker [01] of 2"
    assert re.search(said, program.output), program.output
    assert "Current thread" in program.output or "Thread 0x" in program.output
    assert "stvit_jax/data/prefetch.py" in program.output  # the stacks
    (step,) = re.findall(r"error: .* Step (\d+) is saved, the same command cont", program.output)
    assert (tmp_path / "checkpoints" / step).is_dir()


def test_r14_what_came_before_it_began_is_no_measure(monkeypatch):
    """Of how long a turn may take: compiling takes longer than any step."""
    monkeypatch.setattr("stvit_jax.training.signals.end", lambda *_: None)
    with contextlib.closing(Watchdog(0.5)) as watchdog:
        time.sleep(3)
        watchdog.at("the compiler")
        watchdog.start()
        watchdog.at("the devices")
        began = time.monotonic()
        while not watchdog.stalled:
            assert time.monotonic() - began < 10  # and not 15
            time.sleep(0.1)


@pytest.mark.slow
def test_r14_slow_is_not_hung(start, straight, tmp_path):
    """Steps that take as long as five before are waited for."""
    program = start(tmp_path, "--config.stall_after=3")
    program.read_until("step 3/")
    for _ in range(2):
        program.send(signal.SIGSTOP)
        time.sleep(2)
        program.send(signal.SIGCONT)
        time.sleep(0.3)
    assert program.wait() == 0, program.output
    assert "nothing has happened" not in program.output
    assert_equal_runs(tmp_path, straight)


@pytest.mark.docs
def test_r13_a_second_run_on_a_workdir_is_refused_and_the_first_goes_on(start, straight, tmp_path):
    first = start(tmp_path)
    first.read_until("stvit_tiny on 1 x cpu")
    second = start(tmp_path)
    assert second.wait(60) == 1
    (line,) = second.output.splitlines()
    owner = rf"error: {tmp_path} is in use by process \d+ on \S+, since .* UTC \(0:00:\d\d\): stop"
    assert re.match(owner, line), line
    assert first.wait() == 0, first.output
    assert not (tmp_path / "owner.json").exists()
    assert_equal_runs(tmp_path, straight)


@pytest.mark.slow
def test_r13_the_same_job_takes_over_at_once_after_a_kill(start, tmp_path):
    program = start(tmp_path, *LONG)
    program.read_until("step 2/")
    program.send(signal.SIGKILL)
    assert program.wait() == -9 and (tmp_path / "owner.json").exists()
    began = time.monotonic()
    program = start(tmp_path, "--config.steps=3")
    assert program.wait() == 0, program.output
    assert "looking for" not in program.output and time.monotonic() - began < 60


def elsewhere(workdir: Path) -> Claim:
    """Of a process on another machine."""
    return Claim("t0", "another-host", 12, "another boot", "345", time.time() - 7200, 0)


def write(path: Path, claim: Claim, beats: int) -> None:
    text = json.dumps(claim.__dict__ | {"beats": beats})
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def test_r13_an_owner_on_another_machine_that_lives_is_respected(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("stvit_jax.training.owner.LOOKING", 8.0)
    path, stop = tmp_path / "owner.json", threading.Event()
    write(path, elsewhere(tmp_path), 0)

    def live() -> None:
        beats = 0
        while not stop.wait(0.5):
            write(path, elsewhere(tmp_path), beats := beats + 1)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(ValueError, match=r"by process 12 on another-host, since .*\(2:0"):
            Owner(tmp_path)
    finally:
        stop.set()
        thread.join()
    assert "looking for 8 s whether that lives" in capsys.readouterr().out
    # Nobody renews it any more.
    with Owner(tmp_path):
        assert Claim.read(path).process == os.getpid()
    assert not path.exists()


def test_r13_what_is_no_claim_is_nobodys(tmp_path):
    unreal = json.dumps(elsewhere(tmp_path).__dict__ | {"since": 1e400}).encode()
    for text in (b"", b"[]", b"{", b'{"token": 3}', b"\xff\xfe", unreal):
        (tmp_path / "owner.json").write_bytes(text)
        with Owner(tmp_path):
            pass


@pytest.mark.slow
def test_r13_a_run_that_another_one_has_taken_over_ends(start, tmp_path):
    program = start(tmp_path, *LONG)
    program.read_until("step 2/")
    write(tmp_path / "owner.json", elsewhere(tmp_path), 0)
    assert program.wait(60) == 1, program.output
    assert "is in use by process 12 on another-host" in program.output
    assert json.loads((tmp_path / "owner.json").read_text())["host"] == "another-host"


@pytest.mark.docs
def test_r9_a_stuck_process_ends_the_others(digits_dir, tmp_path):
    flags = (*NARROW, f"--config.data.dir={digits_dir}", "--config.batch_size=64")
    more = ("--config.data.workers=0", "--config.log_every=1", IMPATIENT)
    run = Processes(2, tmp_path, *flags, *more, *LONG)
    first, second = run.programs
    first.read_until("step 4/")
    second.send(signal.SIGSTOP)
    try:
        assert first.wait(120) != 0
    finally:
        second.send(signal.SIGCONT)
        second.wait(120)
    assert "waiting for the devices, or the other processes" in first.output
    assert "training/loop.py" in first.output
