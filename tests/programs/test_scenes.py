"""Segmentation by train.py, on a miniature of ADE20K: what a run promises holds for it, too."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest

import stvit_jax
from tests import mini_ade
from tests.program import NARROW_SETTINGS, Processes, Program, digests, metrics, values

STEPS = 6
MEASURES = ("eval/miou", "eval/aacc", "eval/macc", "eval/count", "eval/unreadable")


@pytest.fixture(scope="module")
def start(compiled, tmp_path_factory):
    """Starts the published recipe, narrow and on small crops; compiled programs are shared."""
    folder = mini_ade.write(tmp_path_factory.mktemp("ade"), train=8, val=4)
    broken = sorted((folder / "images" / "validation").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:200])

    def start(workdir, *flags, count=1, **options):
        common = (
            *(f"--config.model.{field}={value}" for field, value in NARROW_SETTINGS.items()),
            "--config.model.name=stvit_tiny",
            "--config.segmentation.channels=8",
            "--config.segmentation.short_side=48",
            "--config.segmentation.long_side=96",
            "--config.image_size=48",
            f"--config.data.dir={folder}",
            "--config.data.workers=0",
            "--config.dtype=float32",
            "--config.batch_size=8",
            f"--config.total_steps={STEPS}",
            "--config.warmup_steps=2",
            "--config.eval_every_steps=4",
            "--config.log_every=1",
        )
        options = {"config": "configs/upernet_small.py"} | options
        options |= compiled
        if count > 1:
            return Processes(count, workdir, *common, *flags, **options)
        return Program(workdir, *common, *flags, **options)

    return start


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory):
    """The workdir of a run that nobody stopped."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    program = start(workdir)
    assert program.wait() == 0, program.output
    assert "shape 1 of" in program.output and "does not decode" in program.output
    assert program.output.splitlines()[-1].startswith(f"done: step {STEPS} of {STEPS}, raw mIoU")
    return workdir


def evaluated(start, workdir, *flags, count=1, **options):
    """The measures of the weights that a run has, in another way."""
    run = start(workdir, "--config.eval_only=True", *flags, count=count, **options)
    assert run.wait() == (0 if count == 1 else [0] * count), run.output
    return {key: metrics(workdir)[-1][key] for key in MEASURES}


def test_a_run_logs_measures_and_reports_every_class(straight):
    lines = metrics(straight)
    assert set(values(straight, "train/loss")) == set(range(1, STEPS + 1))
    assert {"train/pixel_accuracy", "train/auxiliary_loss"} <= lines[0].keys()
    found = [line for line in lines if "eval/miou" in line]
    assert [line["step"] for line in found] == [4, STEPS]
    for line in found:
        assert set(MEASURES) <= line.keys()
        assert line["eval/count"] == 4 and line["eval/unreadable"] == 1
        assert all(0 <= line[key] <= 1 for key in MEASURES[:3])
    rates = list(values(straight, "train/learning_rate").values())
    base = 6e-5 * 8 / 16  # for 8 images
    assert rates[3] == pytest.approx(base * (1 - 3 / STEPS), rel=1e-9)
    classes = json.loads((straight / "per_class.json").read_text())
    labelled = sum(row["pixels"] for row in classes["classes"].values())
    assert labelled > np.sum(classes["confusion"]) > 0  # the broken picture's pixels have no answer
    assert (straight / "per_class.png").stat().st_size > 5000


def test_a_stopped_run_goes_on_bit_by_bit(start, straight, tmp_path):
    program = start(tmp_path / "run", "--config.data.workers=1")
    program.read_until("step 2/6")
    program.send(signal.SIGTERM)
    assert program.wait() == 75, program.output
    program = start(tmp_path / "run")
    assert program.wait() == 0, program.output
    assert digests(tmp_path / "run", STEPS) == digests(straight, STEPS)


def test_measures_are_the_same_on_any_devices_and_in_every_mode(start, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    own = {key: metrics(straight)[-1][key] for key in MEASURES}
    assert evaluated(start, tmp_path / "run", devices=8) == own
    # A window that nothing exceeds is the whole.
    wide = "--config.segmentation.test=slide", "--config.image_size=96"
    shutil.copytree(straight, tmp_path / "wide")
    slid = evaluated(start, tmp_path / "wide", "--config.init_from=" + str(straight), *wide)
    assert slid == own
    views = "--config.segmentation.test_scales=(0.5, 1.0)", "--config.segmentation.test_flip=True"
    several = evaluated(start, tmp_path / "views", "--config.init_from=" + str(straight), *views)
    assert several["eval/count"] == 4 and several != own
    narrow = "--config.segmentation.test=slide", "--config.image_size=32"
    slid = evaluated(start, tmp_path / "narrow", "--config.init_from=" + str(straight), *narrow)
    assert slid["eval/count"] == 4 and slid != own


def test_two_processes_are_one_run(start, straight, tmp_path):
    run = start(tmp_path / "run", count=2, devices=4)  # eight in all, against one
    assert run.wait() == [0, 0], run.output
    ours, alone = (values(path, "train/loss") for path in (tmp_path / "run", straight))
    assert ours == pytest.approx(alone, rel=1e-5)
    last = metrics(tmp_path / "run")[-1]
    assert last["eval/count"] == 4 and last["eval/unreadable"] == 1


def test_semantic_fpn_trains_stops_and_goes_on(start, tmp_path):
    """On pictures of one's own, one of which is broken: another is learned from in its place."""
    folder = mini_ade.write(tmp_path / "own", train=8, val=2)
    (folder / "classes.txt").write_text("".join(f"thing {i}\n" for i in range(1, 22)))
    broken = sorted((folder / "images" / "training").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:200])
    flags = (
        "--config.data.source=segmentation_folder",
        f"--config.data.dir={folder}",
        "--config.data.max_bad_fraction=0.5",
        "--config.warmup_steps=0",
    )
    options = {"config": "configs/upernet_small.py:fpn"}
    program = start(tmp_path / "run", *flags, **options)
    program.read_until("step 2/6")
    program.send(signal.SIGTERM)
    assert program.wait() == 75, program.output
    assert f"{broken} does not decode" in program.output
    program = start(tmp_path / "run", *flags, **options)
    assert program.wait() == 0, program.output
    assert "fpn on stvit_tiny" in program.output and "continuing after step" in program.output

    lines = metrics(tmp_path / "run")
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1))
    # The set is one batch: a pass each step, and the broken picture once in each.
    assert values(tmp_path / "run", "train/unreadable") == {step: step for step in steps}
    assert "train/pixel_accuracy" in lines[0] and "train/auxiliary_loss" not in lines[0]
    base, last = 1e-4 * 8 / 16, 1e-6
    for step, rate in values(tmp_path / "run", "train/learning_rate").items():
        left = 1 - (step - 1) / STEPS
        assert rate == pytest.approx(last + (base - last) * left**0.9, rel=1e-12)
    assert lines[-1]["eval/count"] == 2 and lines[-1]["eval/unreadable"] == 0
    assert 0 <= lines[-1]["eval/miou"] <= lines[-1]["eval/aacc"] <= 1
    classes = json.loads((tmp_path / "run" / "per_class.json").read_text())["classes"]
    assert list(classes) == [f"thing {i}" for i in range(1, 22)]


def test_a_network_for_classification_is_taken_and_what_is_dropped_is_said(start, tmp_path):
    model = stvit_jax.create_model("stvit_tiny", **NARROW_SETTINGS)
    variables = model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    stvit_jax.save_pretrained(tmp_path / "weights", model, variables)
    flags = f"--config.init_from={tmp_path / 'weights'}", "--config.steps=1"
    program = start(tmp_path / "run", *flags)
    assert program.wait() == 0, program.output
    assert "proj, norm, head are dropped" in program.output
    assert "starting from" in program.output
