"""train.py as a process on the digits: what it leaves, and that it survives being stopped."""

import random
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import convert_torch_weights
import stvit_jax
from stvit_jax.checkpoints import fit, weights
from stvit_jax.data.order import Order
from stvit_jax.data.sources import open_source
from stvit_jax.models import settings
from tests.mini_sets import picture
from tests.program import NARROW, Program, digests, metrics, values
from tests.records import Corrupted

STEPS = 30  # an epoch has 22
WORKER = "--config.data.workers=1"  # as the config has it; most runs do without, to start sooner


@pytest.fixture(scope="module")
def start(digits_dir, tmp_path_factory):
    """Starts the program; all runs of the module share compiled programs."""
    cache = tmp_path_factory.mktemp("compiled")

    def start(workdir: Path, *flags: str, **options: Any) -> Program:
        common = (
            *NARROW,
            f"--config.data.dir={digits_dir}",
            "--config.batch_size=64",
            f"--config.steps={STEPS}",
            "--config.log_every=1",
            "--config.eval_every_epochs=1",
            "--config.checkpoint_every=1000",
            "--config.data.workers=0",
        )
        return Program(
            workdir, *common, *flags, **({"JAX_COMPILATION_CACHE_DIR": str(cache)} | options)
        )

    return start


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory) -> Path:
    """The workdir of a run that nobody stopped."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    program = start(workdir, WORKER, tensorflow=True)
    assert program.wait() == 0, program.output
    assert program.output.splitlines()[-1].startswith(f"done: step {STEPS} of {STEPS}, raw top-1")
    assert program.output.splitlines()[-1].endswith(f"see {workdir}")
    return workdir


def assert_equal_runs(workdir: Path, straight: Path) -> None:
    assert digests(workdir, STEPS) == digests(straight, STEPS)
    for key in ("train/loss", "train/learning_rate", "eval/top1", "eval_ema/loss"):
        assert values(workdir, key) == values(straight, key), key
    steps = [line["step"] for line in metrics(workdir) if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1))  # no line twice, none missing


def test_what_a_run_leaves(straight):
    assert {path.name for path in straight.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
    }
    assert list(straight.glob("events.out.tfevents.*"))
    assert [path.name for path in (straight / "checkpoints").iterdir()] == [str(STEPS)]
    lines = metrics(straight)
    evaluations = [line for line in lines if "eval/top1" in line]
    assert [line["step"] for line in evaluations] == [22, 30]
    for line in evaluations:
        for name in ("eval", "eval_ema"):
            assert line[f"{name}/count"] == 360 and line[f"{name}/unreadable"] == 0
            assert 0 <= line[f"{name}/top1"] <= line[f"{name}/top5"] <= 1
    assert set(lines[0]) == {
        "step",
        "epoch",
        "train/loss",
        "train/learning_rate",
        "train/images_per_second",
    }


def test_the_trained_network_really_samples(straight, digits_dir):
    """The association of the sampled stages is not the uniform 1/9."""
    found = fit.identify(weights.read(straight))
    model = settings.create(found.settings)
    source = open_source("tfds", "digits", str(digits_dir), train=False)
    images = np.stack([stvit_jax.data.eval_image(source[i]["image"], 32) for i in range(8)])
    apply = partial(model.apply, method="feature_maps", mutable=["intermediates"])
    _, state = jax.jit(apply)(found.variables, stvit_jax.data.normalize(images))
    for stage in ("layers_0", "layers_1"):
        attn = state["intermediates"][stage]["blocks_0"]["attn"]
        association = np.asarray(attn["association"][0])
        assert association.shape[1:3] == (2, 2)
        own = association[..., 4]  # the cell that the pixel lies in
        assert np.abs(association - 1 / 9).max() > 0.1
        assert own.std() > 0.02  # and it differs between pixels


def test_the_same_command_on_a_finished_run_does_nothing(start, straight):
    before = digests(straight, STEPS), (straight / "metrics.jsonl").read_text()
    program = start(straight)
    assert program.wait() == 0
    assert "nothing left to do" in program.output
    assert (digests(straight, STEPS), (straight / "metrics.jsonl").read_text()) == before


@pytest.mark.parametrize("batch_size, devices", [(100, 1), (104, 8)])
def test_evaluation_alone_gives_the_same_counts_for_any_batch_size_and_device_count(
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


def test_converted_to_pth_and_back_it_evaluates_to_the_same_counts(start, straight, tmp_path):
    pytest.importorskip("torch")
    pth, back = tmp_path / "weights.pth", tmp_path / "back"
    assert convert_torch_weights.main([str(straight), "--output", str(pth)]) == 0
    assert convert_torch_weights.main([str(pth), "--output", str(back)]) == 0
    before = metrics(straight)[-1]
    for path in (pth, back):
        workdir = tmp_path / f"eval_{path.name}"
        program = start(workdir, "--config.eval_only=True", f"--config.init_from={path}")
        assert program.wait() == 0, program.output
        (line,) = metrics(workdir)
        for key in ("eval/top1", "eval/top5", "eval/loss", "eval/count"):
            assert line[key] == before[key], key
        assert "eval_ema/top1" not in line  # a file holds one set of weights


def test_starts_from_weights_raw_or_averaged(start, straight, tmp_path):
    flags = ("--config.steps=2", f"--config.init_from={straight}", "--config.init_from_ema=True")
    program = start(tmp_path, *flags)
    assert program.wait() == 0, program.output
    assert f"starting from {straight / 'checkpoints' / str(STEPS)}" in program.output
    assert values(tmp_path, "train/loss")[1] != values(straight, "train/loss")[1]
    program = start(tmp_path / "ema", "--config.eval_only=True", *flags)
    assert program.wait() == 0, program.output
    (line,), before = metrics(tmp_path / "ema"), metrics(straight)[-1]
    for key in ("top1", "top5", "loss"):
        assert line[f"eval/{key}"] == before[f"eval_ema/{key}"], key


def test_stopped_at_random_steps_ends_with_the_same_bits(start, straight, tmp_path):
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


def test_killed_at_random_loses_at_most_one_interval(start, straight, tmp_path):
    rng = random.Random(time.time_ns())
    kill = rng.randrange(12, STEPS - 2)
    print("killing after step", kill)
    program = start(tmp_path, WORKER, "--config.checkpoint_every=5")
    program.read_until(rf"step {kill}/{STEPS} ")
    program.send(signal.SIGKILL)
    assert program.wait() == -9
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 29, "train/lo')  # a line that was being written
    program = start(tmp_path, "--config.checkpoint_every=5")
    program.read_until("continuing after step")
    step = int(program.output.split()[-1])
    assert kill - 10 <= step <= kill + 2  # the interval, and the save in flight
    assert program.wait() == 0, program.output
    assert_equal_runs(tmp_path, straight)


def test_a_run_of_a_version_that_kept_no_state_of_evaluations_goes_on(start, straight, tmp_path):
    program = start(tmp_path, "--config.steps=25")
    assert program.wait() == 0, program.output
    for name in ("evaluations.json", "classes.json"):
        (tmp_path / name).unlink()
    program = start(tmp_path)
    assert program.wait() == 0, program.output
    assert digests(tmp_path, STEPS) == digests(straight, STEPS)
    assert list(values(tmp_path, "eval/top1")) == [22, 25, 30]


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(start, straight, tmp_path):
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


def test_a_corrupt_record_is_named_and_costs_no_step(start, straight, digits_dir, tmp_path):
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


def test_unreadable_images_are_counted_until_there_are_too_many(start, tmp_path):
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_ends_at_once(start, tmp_path, number):
    program = start(tmp_path, WORKER, JAX_COMPILATION_CACHE_DIR="")
    program.read_until("stvit_tiny on 1 x cpu")  # from here it creates and compiles for a while
    sent = time.monotonic()
    program.send(number)
    assert program.wait(30) == 75, program.output
    assert time.monotonic() - sent < 30
    assert f"{number.name}: stopped before the first step" in program.output


def test_an_interrupted_evaluation_is_repeated(start, straight, tmp_path):
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


def test_trains_where_tensorflow_is_missing(start, straight, tmp_path):
    """Prepares the data, too."""
    workdir = tmp_path / "run"
    program = start(workdir, f"--config.data.dir={tmp_path / 'data'}")
    assert program.wait() == 0, program.output
    assert program.output.count("no TensorBoard files") == 1
    assert not list(workdir.glob("events*"))
    assert_equal_runs(workdir, straight)


def test_eight_devices_give_the_losses_of_one(start, straight, tmp_path):
    program = start(tmp_path, "--config.steps=20", devices=8)
    assert program.wait() == 0, program.output
    assert "on 8 x cpu" in program.output
    # The config's one group is on all of them.
    assert program.output.count("8 images a device and groups of 64: every normalisation") == 1
    one, eight = values(straight, "train/loss"), values(tmp_path, "train/loss")
    for step in range(1, 21):
        assert eight[step] == pytest.approx(one[step], rel=1e-5), step


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--config.batch_sizee=64",), "config.batch_sizee; did you mean config.batch_size?"),
        (("--config.data.name=digit",), "there: digits): did you mean digits?"),
        (("--config.seed=1",), "config.seed is 1, was 0"),
        (("--config.batch_size=60",), "batch_size 60 is not divisible by the 8 devices"),
        (("--config.model.num_classes=5",), "num_classes is 5, but digits has 10 classes"),
    ],
)
def test_mistakes_fail_in_one_line(start, straight, tmp_path, flags, message):
    before = digests(straight, STEPS)
    workdir = straight if "seed" in flags[0] else tmp_path / "new"
    program = start(workdir, *flags, devices=8)
    assert program.wait(60) == 1
    assert "Traceback" not in program.output
    assert program.output.startswith("error: ") and message in program.output
    assert len(program.output.splitlines()) == 1
    assert digests(straight, STEPS) == before


@pytest.mark.slow
def test_the_embedded_default_learns(digits_dir, tmp_path):
    program = Program(tmp_path, f"--config.data.dir={digits_dir}")
    assert program.wait(600) == 0, program.output
    assert metrics(tmp_path)[-1]["eval/top1"] >= 0.97
    assert metrics(tmp_path)[-1]["eval_ema/top1"] >= 0.97
