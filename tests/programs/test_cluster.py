"""train.py as several processes with two devices each, as on so many hosts: one run."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stvit_jax.data.order import Order
from tests.program import NARROW, ROOT, Processes, Program, metrics, values
from tests.records import Corrupted

STEPS = 20


@pytest.fixture(scope="module")
def flags(digits_dir: Path) -> list[str]:
    return [
        *NARROW,
        f"--config.data.dir={digits_dir}",
        "--config.batch_size=64",
        "--config.group_size=16",
        "--config.dtype=float32",
        f"--config.steps={STEPS}",
        "--config.log_every=1",
        "--config.data.workers=0",
    ]


@pytest.fixture(scope="module")
def start(flags, compiled) -> Callable[..., Processes]:
    """Starts processes."""

    def start(count: int, workdir: Path, *more: str, **options: Any) -> Processes:
        return Processes(count, workdir, *flags, *more, **(compiled | options))

    return start


@pytest.fixture(scope="module")
def astray(flags, tmp_path_factory) -> dict[str, tuple[float, list[Program]]]:
    """Processes that do not find each other, while other tests run; and when they began."""
    workdir = tmp_path_factory.mktemp("astray") / "run"
    port = free_port()

    def start(number: int, count: int, port: int) -> Program:
        address = f"--coordinator_address=127.0.0.1:{port}"
        which = (f"--num_processes={count}", f"--process_id={number}")
        return Program(workdir, *flags, address, *which)

    missing = [start(i, 3, port) for i in range(2)]
    return {
        "nobody": (time.monotonic(), [start(1, 2, free_port())]),
        "missing": (time.monotonic(), missing),
    }


@pytest.fixture(scope="module")
def alone(flags, compiled, tmp_path_factory) -> Path:
    """The workdir of one process that has the same four devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    program = Program(workdir, *flags, devices=4, **compiled)
    assert program.wait() == 0, program.output
    return workdir


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def assert_same_losses(workdir: Path, alone: Path) -> None:
    expected = values(alone, "train/loss")
    losses = values(workdir, "train/loss")
    assert list(losses) == list(expected) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-5)
    last, wanted = metrics(workdir)[-1], metrics(alone)[-1]
    for key in ("eval/count", "eval/top1", "eval/top5", "eval_ema/count", "eval_ema/top1"):
        assert last[key] == wanted[key], key


@pytest.mark.usefixtures("astray")  # these begin to wait
def test_two_processes_are_one_run(start, alone, tmp_path) -> None:
    run = start(2, tmp_path / "run")
    assert run.wait() == [0, 0], run.output
    assert_same_losses(tmp_path / "run", alone)
    assert len(metrics(tmp_path / "run")) == len(metrics(alone))  # one of them writes
    # Gloo's threads write what they like, and into each other's lines.
    first, second = (
        [x for x in p.output.splitlines() if not re.search("Gloo|peer ranks|^ *$", x)]
        for p in run.programs
    )
    assert first[0] == "process 0 of 2: 2 of 4 x cpu"
    assert second == ["process 1 of 2: 2 of 4 x cpu"]
    assert first[-1].startswith(f"done: step {STEPS} of {STEPS}")


@pytest.mark.docs
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_stop_of_one_stops_all_and_other_numbers_of_processes_continue(
    start, alone, tmp_path, count
) -> None:
    """From many to one, and from one to two; four compile a program of their own."""
    workdir = tmp_path / "run"
    many = start(count, workdir)
    many.programs[0].read_until("step 3/")
    many.programs[count // 2].send(signal.SIGTERM)
    assert many.wait(60) == [75] * count, many.output
    (step,) = map(int, re.findall(rf"stopped at step (\d+) of {STEPS}, saved", many.output))
    assert 3 <= step < STEPS
    one = start(1, workdir, devices=4).programs[0]
    one.read_until(rf"step {step + 2}/")
    one.send(signal.SIGTERM)
    assert one.wait(60) == 75, one.output
    two = start(2, workdir)
    two.programs[0].read_until("continuing after step")
    assert two.wait() == [0, 0], two.output
    assert_same_losses(workdir, alone)


def errors(run: Processes) -> list[list[str]]:
    """Of every process, the lines that end it; there are no traces."""
    assert "Traceback" not in run.output and "Check failure" not in run.output, run.output
    return [
        [line for line in program.output.splitlines() if "error: " in line]
        for program in run.programs
    ]


@pytest.mark.slow
def test_a_fault_of_the_data_of_one_process_costs_no_step(
    start, alone, digits_dir, tmp_path
) -> None:
    """It is noticed when it is read; all stop with the step before it, and one tells."""
    shutil.copytree(digits_dir, tmp_path / "data")
    order = Order(1437, 64, group_size=16, repeats=1)
    corrupted = Corrupted(tmp_path / "data", order, batch=8, slot=40)  # 32 to 63 are process 1's
    own = {1: [f"--config.data.dir={tmp_path / 'data'}"]}
    run = start(2, tmp_path / "run", "--config.log_every=3", own=own)
    assert run.wait() == [1, 1], run.output
    (told,), silent = errors(run)
    assert f"error: process 1: {corrupted.file}, record {corrupted.record} cannot be read" in told
    assert told.endswith("Step 8 is saved, the same command continues") and not silent
    corrupted.mend()
    run = start(2, tmp_path / "run", own=own)
    assert run.wait() == [0, 0], run.output
    assert "continuing after step 8" in run.programs[0].output
    expected, found = values(alone, "train/loss"), values(tmp_path / "run", "train/loss")
    for step in range(9, STEPS + 1):
        assert found[step] == pytest.approx(expected[step], rel=1e-5)


@pytest.mark.slow
def test_a_save_that_fails_in_one_process_fails_in_all_and_ends_nothing(
    start, alone, tmp_path
) -> None:
    """Nothing larger than a few kilobytes can be written while steps 5 and 10 are saved."""
    workdir = tmp_path / "run"
    run = start(2, workdir, "--config.checkpoint_every=5")
    writing = run.programs[0]
    writing.limit_files(4096)
    writing.read_until("checkpoint of batch 5 was not saved")
    writing.limit_files(None)
    assert run.wait() == [0, 0], run.output
    assert "going on, no other is there" in writing.output
    assert "was not saved" not in run.programs[1].output
    assert_same_losses(workdir, alone)


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_named(start, tmp_path) -> None:
    own = {1: [f"--workdir={tmp_path / 'other'}"]}
    run = start(2, tmp_path / "run", own=own)
    assert run.wait(90) == [1, 1], run.output
    (told,), silent = errors(run)
    assert f"process 1: {tmp_path / 'other'} is not the same folder" in told and not silent
    assert "compiled" not in run.output


@pytest.mark.slow
def test_other_data_on_one_host_are_refused(start, digits_dir, tmp_path) -> None:
    own = {1: ["--config.data.source=fake", "--config.data.dir="]}
    run = start(2, tmp_path / "run", own=own)
    assert run.wait(90) == [1, 1], run.output
    (told,), silent = errors(run)
    assert "process 1: the data here are others than those of process 0" in told and not silent


@pytest.mark.slow
def test_what_only_one_process_gets_wrong_ends_all(start, tmp_path) -> None:
    own = {1: ["--config.data.dir=/nowhere", "--config.data.source=folder"]}
    run = start(2, tmp_path / "run", own=own)
    assert run.wait(90) == [1, 1], run.output
    (told,), silent = errors(run)
    assert "process 1: " in told and "/nowhere" in told and not silent
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_evaluation_alone_by_two_processes(start, alone, tmp_path) -> None:
    flags = ("--config.eval_only=True", f"--config.init_from={alone}")
    run = start(2, tmp_path / "run", *flags)
    assert run.wait() == [0, 0], run.output
    (line,) = metrics(tmp_path / "run")
    for key in ("eval/count", "eval/top1", "eval/top5"):
        assert line[key] == metrics(alone)[-1][key]


@pytest.mark.slow
def test_two_processes_start_from_weights_that_both_see(start, alone, tmp_path) -> None:
    run = start(2, tmp_path / "run", "--config.steps=2", f"--config.init_from={alone}")
    assert run.wait() == [0, 0], run.output
    assert f"starting from {alone}" in run.programs[0].output
    first = values(tmp_path / "run", "train/loss")[1]
    assert first != values(alone, "train/loss")[1]
    own = {1: [f"--config.init_from={tmp_path / 'nothing'}"]}
    run = start(2, tmp_path / "other", f"--config.init_from={alone}", own=own)
    assert run.wait(120) == [1, 1], run.output
    (told,), silent = errors(run)
    assert "is a file, or nothing here, and of a run in process 0: share it" in told and not silent


@pytest.mark.slow
def test_two_processes_are_taught_as_one(flags, start, alone, compiled, tmp_path) -> None:
    taught = f"--config.teacher.init_from={alone}", "--config.teacher.kind=hard"
    more = (*taught, "--config.steps=3", "--config.seed=7")
    program = Program(tmp_path / "one", *flags, *more, devices=4, **compiled)
    assert program.wait() == 0, program.output
    run = start(2, tmp_path / "two", *more)
    assert run.wait() == [0, 0], run.output
    assert run.output.count(f"learning from {alone}") == 1
    for key in ("train/distillation_loss", "train/loss"):
        one, two = (values(tmp_path / name, key) for name in ("one", "two"))
        assert list(two) == [1, 2, 3] and two == pytest.approx(one, rel=1e-5)


SLOTS = """
import sys
import jax, numpy as np
from jax.sharding import Mesh
from stvit_jax import cluster, parallel
cluster.join(cluster.Membership(sys.argv[1], 2, int(sys.argv[2])))
devices = sorted(jax.devices(), key=lambda d: (d.id % 2, d.process_index))
assert [d.process_index for d in devices] == [0, 1, 0, 1]
mesh = Mesh(np.array(devices), ("data",))
slots = parallel.own_slots(8, mesh)
batch = parallel.from_slots(np.stack([slots, slots], 1), parallel.by_image(mesh))
whole = jax.jit(lambda x: x * 1, out_shardings=parallel.replicated(mesh))(batch)
cluster.barrier()
print("slots", slots.tolist(), np.asarray(whole)[:, 1].tolist())
"""


def test_slots_come_from_the_sharding_where_processes_alternate(tmp_path) -> None:
    """Devices 0 and 2 of the mesh are one process's, 1 and 3 the other's."""
    address = f"127.0.0.1:{free_port()}"
    flag = "--xla_force_host_platform_device_count=2"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SLOTS, address, str(i)],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": flag},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in running]
    order = list(range(8))
    assert f"slots [0, 1, 4, 5] {order}" in said[0] and f"slots [2, 3, 6, 7] {order}" in said[1]


@pytest.mark.parametrize(
    "which, words",
    [
        ("nobody", "nobody answers at --coordinator_address 127.0.0.1:"),
        ("missing", "have not found each other within 50 s: --num_processes is 3: has every one"),
    ],
)
def test_processes_that_do_not_find_each_other_say_so_within_a_minute(astray, which, words) -> None:
    began, programs = astray[which]
    for program in programs:
        assert program.wait(max(1, began + 75 - time.monotonic())) == 1, program.output
        assert words in program.output and "Traceback" not in program.output
        assert "Check failure" not in program.output


@pytest.mark.parametrize(
    "given, words",
    [
        (["--num_processes=2"], "--coordinator_address and --process_id must be given, too"),
        (["--coordinator_address=h", "--num_processes=2", "--process_id=0"], "no HOST:PORT"),
        (["--coordinator_address=h:1", "--num_processes=2", "--process_id=2"], "none of 0 to 1"),
        (["--coordinator_address=h:1", "--num_processes=2", "--process_id=x"], "invalid int"),
    ],
)
def test_mistakes_in_the_flags_are_one_line(flags, tmp_path, given, words) -> None:
    program = Program(tmp_path / "run", *flags, *given)
    assert program.wait(60) == 1
    (line,) = program.output.splitlines()
    assert line.startswith("error: ") and words in line


@pytest.mark.slow
def test_another_count_is_refused_by_who_has_it(flags, tmp_path) -> None:
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    first, second = (
        Program(tmp_path / "run", *flags, address, f"--num_processes={n}", f"--process_id={i}")
        for i, n in ((0, 2), (1, 3))
    )
    assert second.wait(90) == 1 and first.wait(90) != 0
    assert "process 0 counts 2 processes, and this one was started with" in second.output


@pytest.mark.slow
def test_a_process_that_compiles_for_longer_is_waited_for(start, alone, tmp_path) -> None:
    """Longer than any collective waits: gloo's have 30 seconds."""
    run = start(2, tmp_path / "run", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"))
    run.programs[0].read_until("compiled the evaluation step")
    run.programs[1].send(signal.SIGSTOP)
    run.programs[0].read_until("compiled the training step")
    time.sleep(40)
    run.programs[1].send(signal.SIGCONT)
    assert run.wait() == [0, 0], run.output
    assert_same_losses(tmp_path / "run", alone)


@pytest.mark.slow
def test_a_dead_process_ends_the_others_and_the_same_command_continues(
    start, alone, tmp_path
) -> None:
    run = start(2, tmp_path / "run", "--config.checkpoint_every=4", "--config.steps=10000")
    run.programs[0].read_until("step 9/")
    run.programs[1].send(signal.SIGKILL)
    began = time.monotonic()
    assert run.programs[0].wait(120) != 0 and time.monotonic() - began < 120
    *_, saved, newest = sorted(
        int(path.name) for path in (tmp_path / "run/checkpoints").iterdir() if path.name.isdecimal()
    )
    # All agree on what is sound, too.
    largest = max(
        (tmp_path / f"run/checkpoints/{newest}").rglob("*"), key=lambda p: p.stat().st_size
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    run = start(2, tmp_path / "run")
    assert run.wait() == [0, 0], run.output
    assert run.output.count(f"checkpoints/{newest} is damaged") == 1
    assert f"continuing after step {saved}" in run.programs[0].output
    assert_same_losses(tmp_path / "run", alone)
