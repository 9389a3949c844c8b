"""What docs/reliability.md promises: the fault provoked, on the real program.

What is not `slow` runs by default or in CI. Of R3, R4 and R5 all is: the part concerned has quick
tests in `tests/checkpoints`. R9 needs several processes: `test_standstill.py`.
"""

import random
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from stvit_jax.checkpoints import weights
from stvit_jax.data.order import Order
from stvit_jax.data.sources import open_source
from stvit_jax.errors import UserError
from tests.mini_sets import picture
from tests.program import STEPS, WORKER, assert_equal_runs, digests, metrics, values
from tests.records import Corrupted

SLOW = pytest.mark.slow


@pytest.mark.parametrize("run", [0, *(pytest.param(i, marks=SLOW) for i in range(1, 9))])
def test_r1_stopped_at_random_steps_ends_with_the_same_bits(start, straight, tmp_path, run):
    rng = random.Random(time.time_ns())
    # A run may stop a few steps after the signal: the second signal is for steps well after that.
    stops = rng.randrange(2, 12), rng.randrange(17, STEPS - 2)
    print("stopping after steps", stops)
    for stop, number in zip(stops, (signal.SIGTERM, signal.SIGINT), strict=True):
        program = start(tmp_path, WORKER)
        program.read_until(rf"step {stop}/{STEPS} ")
        program.send(number)
        assert program.wait(30) == 75, program.output
        assert "the same command continues" in program.output
        step = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
        # The program's own lines say how far it was: this process may be slow to send the signal.
        before = program.output.split(f"{number.name}: saving after this step")[0]
        reached = int(re.findall(rf"step (\d+)/{STEPS} ", before)[-1])
        assert stop <= reached <= step <= reached + 3
    program = start(tmp_path)
    assert program.wait() == 0, program.output
    assert f"continuing after step {step}" in program.output
    assert_equal_runs(tmp_path, straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=SLOW)])
def test_r2_a_signal_before_the_first_step_ends_at_once(start, tmp_path, number):
    program = start(tmp_path, WORKER, JAX_COMPILATION_CACHE_DIR="")
    program.read_until("stvit_tiny on 1 x cpu")  # from here it creates and compiles for a while
    sent = time.monotonic()
    program.send(number)
    assert program.wait(30) == 75, program.output
    assert time.monotonic() - sent < 30
    assert f"{number.name}: stopped before the first step" in program.output


@pytest.mark.slow
def test_r2_an_interrupted_evaluation_is_repeated(start, straight, tmp_path):
    flags = ("--config.batch_size=8", "--config.steps=20")  # 45 batches to evaluate
    program = start(tmp_path, *flags)
    program.read_until(r"step 20/20 ")
    program.send(signal.SIGTERM)
    assert program.wait(30) == 75, program.output
    assert not values(tmp_path, "eval/top1")
    program = start(tmp_path, *flags)
    assert program.wait() == 0, program.output
    assert values(tmp_path, "eval/count") == {20: 360}
    assert len(values(tmp_path, "train/loss")) == 20


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 50])
def test_r3_killed_at_random_loses_at_most_one_interval(start, straight, tmp_path, kills):
    """At a random moment after it has begun to train; many times in one run, if it lasts."""
    rng = random.Random(seed := time.time_ns())
    print("seed", seed)
    saved, every = 0, 5
    for _ in range(kills):
        program = start(tmp_path, "--config.checkpoint_every=5")
        program.read_until("compiled the training step")
        time.sleep(rng.uniform(0, 1.5))
        program.send(signal.SIGKILL)
        program.wait()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 29, "train/lo')  # a line that was being written
        reached = [int(n) for n in re.findall(rf"step (\d+)/{STEPS} ", program.output)]
        newest = newest_checkpoint(tmp_path)
        # The interval, and the save in flight.
        assert newest >= max([saved, *(step - 2 * every for step in reached)])
        if "done: " in program.output:
            shutil.rmtree(tmp_path)
            newest = 0
        saved = newest
    program = start(tmp_path, "--config.checkpoint_every=5")
    assert program.wait() == 0, program.output
    assert saved == 0 or f"continuing after step {saved}" in program.output
    assert_equal_runs(tmp_path, straight)


def newest_checkpoint(workdir: Path) -> int:
    found = (workdir / "checkpoints").glob("*")
    return max((int(path.name) for path in found if path.name.isdecimal()), default=0)


@pytest.mark.slow
def test_r4_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(start, straight, tmp_path):
    program = start(tmp_path, "--config.checkpoint_every=10", "--config.steps=20")
    assert program.wait() == 0, program.output
    largest = max((tmp_path / "checkpoints/20").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    program = start(tmp_path)
    assert program.wait() == 0, program.output
    named = [line for line in program.output.splitlines() if "checkpoints/20 is damaged" in line]
    assert len(named) == 1
    assert "continuing after step 10" in program.output
    assert_equal_runs(tmp_path, straight)


@pytest.mark.slow
def test_r4_any_of_a_hundred_flipped_bits_is_noticed_or_harmless(straight, tmp_path, capfd):
    """Of the real program's checkpoint: what is read is what was saved, or it is named."""
    rng = random.Random(seed := time.time_ns())
    print("seed", seed)
    run = shutil.copytree(straight, tmp_path / "run")
    files = [path for path in (run / "checkpoints").rglob("*") if path.is_file()]
    sound = weights.read(run).variables
    noticed = 0
    for _ in range(100):
        path = rng.choices(files, [path.stat().st_size for path in files])[0]
        content = bytearray(before := path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            found = weights.read(run).variables
        except UserError as error:
            assert "no checkpoint in" in str(error)
            noticed += 1
        else:
            jax.tree.map(np.testing.assert_array_equal, found, sound)
        path.write_bytes(before)
    print(f"{noticed} of 100 noticed, the others changed nothing")
    assert noticed >= 10  # most bits are of the optimiser and the average, which are not read here


@pytest.mark.slow
def test_r5_a_full_disk_costs_the_saves_of_that_time(start, straight, tmp_path):
    """No file may grow beyond a few kilobytes, then any may again."""
    program = start(tmp_path, "--config.checkpoint_every=5")
    program.read_until("compiled the training step")
    program.limit_files(8192)
    program.read_until("checkpoint of batch 5 was not saved: File too large")
    program.limit_files(None)
    assert program.wait() == 0, program.output
    assert newest_checkpoint(tmp_path) == STEPS
    assert digests(tmp_path, STEPS) == digests(straight, STEPS)


@pytest.mark.slow
def test_r5_three_failed_saves_in_a_row_end_the_run(start, tmp_path):
    program = start(tmp_path, "--config.checkpoint_every=5")
    program.read_until("compiled the training step")
    program.limit_files(8192)
    assert program.wait() == 1, program.output
    assert "error: 3 saves in a row failed in" in program.output
    assert "Traceback" not in program.output


@pytest.mark.docs
def test_r6_unreadable_images_are_counted_until_there_are_too_many(start, tmp_path):
    unreadable = range(0, 160, 20)
    for split, count in (("train", 160), ("val", 20)):
        for i in range(count):
            path = tmp_path / "data" / split / str(i % 10) / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"no image" if i in unreadable else picture(i, (32, 32), "PNG"))
    source = open_source("folder", "", str(tmp_path / "data"), train=True)
    bad = [i for i in range(160) if source[i]["image"] == b"no image"]
    order = Order(160, 64, repeats=1)
    batches = (order.images(s // 2, order.positions(s % 2, np.arange(64)))[0] for s in range(4))
    expected = np.cumsum([np.isin(batch, bad).sum() for batch in batches]).tolist()

    flags = ("--config.data.source=folder", f"--config.data.dir={tmp_path / 'data'}")
    workdir = tmp_path / "run"
    program = start(workdir, *flags, "--config.steps=4", "--config.data.max_bad_fraction=0.5")
    assert program.wait() == 0, program.output
    assert list(values(workdir, "train/unreadable").values()) == [n for n in expected if n]
    assert set(values(workdir, "eval/count").values()) == {20}
    assert set(values(workdir, "eval_ema/unreadable").values()) == {1}
    assert "train/0/000.png does not decode: " in program.output

    program = start(workdir, *flags, "--config.data.max_bad_fraction=0.001")
    assert program.wait() == 1
    last = program.output.splitlines()[-1]
    match = r"error: .* images do not decode, more than config.data.max_bad_fraction 0.001: .*Step"
    assert re.match(match, last), program.output
    step = re.search(r"Step (\d+) is saved, the same command continues", last).group(1)
    assert int(step) > 4 and (workdir / "checkpoints" / step).is_dir()


@pytest.mark.slow
def test_r6_a_corrupt_record_is_named_and_costs_no_step(start, straight, digits_dir, tmp_path):
    """The steps before it are saved; with the file restored, the run ends as if it was sound."""
    shutil.copytree(digits_dir, tmp_path / "data")
    order = Order(1437, 64, repeats=1)
    corrupted = Corrupted(tmp_path / "data", order, batch=12, slot=0)

    where = f"--config.data.dir={tmp_path / 'data'}"
    program = start(tmp_path / "run", WORKER, where)
    assert program.wait() == 1
    assert "Traceback" not in program.output
    (line,) = (line for line in program.output.splitlines() if line.startswith("error: "))
    assert (
        f"{corrupted.file}, record {corrupted.record} cannot be read, the file is damaged" in line
    )
    assert line.endswith("Step 12 is saved, the same command continues")
    corrupted.mend()
    program = start(tmp_path / "run", where)
    assert program.wait() == 0, program.output
    assert "continuing after step 12" in program.output
    assert_equal_runs(tmp_path / "run", straight)


def test_r7_eight_devices_give_the_losses_of_one(start, straight, tmp_path):
    program = start(tmp_path, "--config.steps=20", devices=8)
    assert program.wait() == 0, program.output
    assert "on 8 x cpu" in program.output
    # The config's one group is on all of them.
    assert program.output.count("8 images a device and groups of 64: every normalisation") == 1
    one, eight = values(straight, "train/loss"), values(tmp_path, "train/loss")
    for step in range(1, 21):
        assert eight[step] == pytest.approx(one[step], rel=1e-5), step


@pytest.mark.parametrize("batch_size, devices", [pytest.param(100, 1, marks=SLOW), (104, 8)])
def test_r11_evaluation_alone_gives_the_same_counts_for_any_batch_size_and_device_count(
    start, straight, tmp_path, batch_size, devices
):
    shutil.copytree(straight, tmp_path / "run")
    flags = ("--config.eval_only=True", f"--config.batch_size={batch_size}")
    program = start(tmp_path / "run", *flags, devices=devices)
    assert program.wait() == 0, program.output
    last, before = metrics(tmp_path / "run")[-1], metrics(straight)[-1]
    for key in ("eval/top1", "eval/top5", "eval/count", "eval_ema/top1", "eval_ema/top5"):
        assert last[key] == before[key], key
    assert last["eval/loss"] == pytest.approx(before["eval/loss"], rel=1e-5)
    assert last["epoch"] == before["epoch"] and last["eval_only"] is True


EXPLODES = (  # a rate of 1e30 in two epochs of two batches; a sane one after them
    "--config.batch_size=512",
    "--config.group_size=64",
    "--config.warmup_learning_rate=1e30",
    "--config.warmup_epochs=1",
)


@pytest.mark.docs
def test_r8_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(start, tmp_path):
    program = start(tmp_path, *EXPLODES, "--config.checkpoint_every=1", "--config.log_every=4")
    assert program.wait() == 1, program.output
    (line,) = (x for x in program.output.splitlines() if x.startswith("error: "))
    assert re.match(r"error: the loss is (nan|inf) at step 2 \(learning rate 1.00e\+30, norm", line)
    assert (
        "it is not saved, no checkpoint can be read, and" in line or "the newest is step 1" in line
    )
    assert newest_checkpoint(tmp_path) < 2


@pytest.mark.slow
def test_r8_skipped_it_goes_on_from_the_last_good_state(start, tmp_path):
    flags = (*EXPLODES, "--config.on_nonfinite=skip", "--config.steps=12")
    program = start(tmp_path / "run", *flags)
    assert program.wait() == 0, program.output
    assert re.search(
        r"the loss is nan at step 2 \(.*\): back to step 0, past batches 1 to 2 \(skip 1 of 3\)",
        program.output,
    )
    assert "back to step 2, past batches 3 to 4 (skip 2 of 3)" in program.output
    assert values(tmp_path / "run", "train/skipped") == {2: 2, 4: 2}
    losses = values(tmp_path / "run", "train/loss")
    assert list(losses) == list(range(5, 13)) and np.isfinite(list(losses.values())).all()
    # Killed after the skip, it neither comes to it again nor forgets it.
    # It is given more steps, so that it has not come to its end however late the signal is.
    killed = start(tmp_path / "killed", *flags, "--config.steps=30")
    killed.read_until("skip 2 of 3")
    killed.read_until("step 7/")
    # What is saved at the skip is written beside the next steps; a kill in between goes back to 2.
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed/checkpoints/4").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send(signal.SIGKILL)
    killed.wait()
    program = start(tmp_path / "killed", *flags)
    assert program.wait() == 0, program.output
    assert "continuing after step 4" in program.output and "(skip" not in program.output
    assert digests(tmp_path / "killed", 12) == digests(tmp_path / "run", 12)


@pytest.mark.slow
def test_r8_after_three_skips_it_ends(start, tmp_path):
    flags = ("--config.learning_rate=1e30", "--config.warmup_learning_rate=1e30")
    program = start(tmp_path, *EXPLODES[:2], *flags, "--config.on_nonfinite=skip")
    assert program.wait() == 1, program.output
    assert program.output.count("(skip ") == 3
    assert "after 3 skips; it is not saved, the newest is step 6" in program.output


class Malicious:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("was-run"),)


def test_r10_a_malicious_pickle_runs_nothing(start, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"model": {"x": Malicious()}}, file)
    program = start(tmp_path / "run", f"--config.init_from={file}")
    assert program.wait() == 1, program.output
    assert f"error: {file}" in program.output and "Traceback" not in program.output
    assert not Path("was-run").exists() and not (tmp_path / "run/checkpoints/1").exists()
