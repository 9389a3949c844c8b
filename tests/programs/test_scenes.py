"""Segmentation by train.py: what a run promises holds for it, too.

UPerNet on a miniature of ADE20K, and Semantic FPN on a few classes of one's own.
"""

import json
import re
import shutil
import signal
from functools import partial

import jax
import numpy as np
import pytest

import stvit_jax
from tests import mini_ade
from tests.program import NARROW_SETTINGS, WORKER, Processes, Program, digests, metrics, values

STEPS, FIRST = 6, 4  # of a run, and after which it evaluates first
MEASURES = ("eval/miou", "eval/aacc", "eval/macc", "eval/count", "eval/unreadable")
SHAPES = mini_ade.SIZES[:3]  # of pictures to evaluate on, and every one is resized into another


def begin(folder, compiled, config, workdir, *flags, count=1, **options):
    """Starts a published recipe, narrow and on small crops; compiled programs are shared."""
    common = (
        *(f"--config.model.{field}={value}" for field, value in NARROW_SETTINGS.items()),
        "--config.model.name=stvit_tiny",
        "--config.model.stoken_size=(4, 1, 1, 1)",
        "--config.segmentation.channels=8",
        "--config.segmentation.short_side=48",
        "--config.segmentation.long_side=96",
        "--config.image_size=48",
        f"--config.data.dir={folder}",
        "--config.data.workers=0",
        "--config.dtype=float32",
        "--config.batch_size=8",
        f"--config.total_steps={STEPS}",
        f"--config.eval_every_steps={FIRST}",
        "--config.log_every=1",
    )
    options = {"config": config} | options | compiled
    if count > 1:
        return Processes(count, workdir, *common, *flags, **options)
    return Program(workdir, *common, *flags, **options)


def damage(folder, number):
    """Cuts an image of a split short; its path."""
    path = sorted(folder.iterdir())[number]
    path.write_bytes(path.read_bytes()[:200])
    return path


def assert_equal_runs(workdir, straight):
    assert digests(workdir, STEPS) == digests(straight, STEPS)
    for key in ("train/loss", "train/learning_rate", *MEASURES):
        assert values(workdir, key) == values(straight, key), key


def assert_every_shape_is_compiled_once(output, count):
    """And counted, over all evaluations of a run."""
    found = re.findall(r"compiled the evaluation step, shape (\d+) of (\d+), in", output)
    assert found == [(str(i + 1), str(count)) for i in range(count)]


@pytest.fixture(scope="module")
def fpn(compiled, tmp_path_factory):
    """Starts Semantic FPN from a network for classification, on a folder with two broken files.

    Returns:
      (what starts it, the broken picture to learn from).
    """
    tmp_path = tmp_path_factory.mktemp("fpn")
    folder = mini_ade.write(tmp_path / "own", train=8, val=4, sizes=SHAPES[:2])
    (folder / "classes.txt").write_text("".join(f"thing {i}\n" for i in range(1, 22)))
    broken = damage(folder / "images" / "training", 3)
    damage(folder / "annotations" / "validation", 2)
    model = stvit_jax.create_model("stvit_tiny", **NARROW_SETTINGS)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.uniform(0.1, 0.2, x.shape).astype(x.dtype), shapes)
    stvit_jax.save_pretrained(tmp_path / "weights", model, variables)
    flags = (
        "--config.data.source=segmentation_folder",
        "--config.data.max_bad_fraction=0.5",
        "--config.warmup_steps=0",
        "--config.eval_every_steps=0",
        f"--config.init_from={tmp_path / 'weights'}",
    )
    start = partial(begin, folder, compiled, "configs/upernet_small.py:fpn")
    return lambda workdir, *more: start(workdir, *flags, *more), broken


@pytest.fixture(scope="module")
def straight_fpn(fpn, tmp_path_factory):
    """(the workdir of a run that nobody stopped, what it said)."""
    workdir = tmp_path_factory.mktemp("straight_fpn") / "run"
    program = fpn[0](workdir)
    assert program.wait() == 0, program.output
    return workdir, program.output


@pytest.mark.docs
def test_semantic_fpn_trains_and_evaluates(fpn, straight_fpn):
    """Another picture is learned from for the broken one."""
    (straight, output), (_, broken) = straight_fpn, fpn
    assert "fpn on stvit_tiny" in output and "starting from" in output
    assert "proj, norm, head are dropped" in output
    assert output.count(f"{broken} does not decode") == 1
    assert_every_shape_is_compiled_once(output, 2)
    assert output.splitlines()[-1].startswith(f"done: step {STEPS} of {STEPS}, raw mIoU")
    lines, steps = metrics(straight), list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "train/loss" in line] == steps
    # The set is one batch: a pass each step, and the broken picture once in each.
    assert values(straight, "train/unreadable") == {step: step for step in steps}
    assert "train/pixel_accuracy" in lines[0] and "train/auxiliary_loss" not in lines[0]
    base, last = 1e-4 * 8 / 16, 1e-6
    for step, rate in values(straight, "train/learning_rate").items():
        left = (STEPS - step + 1) / STEPS
        assert rate == pytest.approx(last + (base - last) * left**0.9, rel=1e-12)
    assert values(straight, "eval/count") == {STEPS: 4}
    assert (lines[-1]["eval/unreadable"], lines[-1]["eval/unlabelled"]) == (1, 1)
    assert "(4 images, 1 of them unreadable, 1 without a labelled pixel)" in output
    assert 0 <= lines[-1]["eval/miou"] <= lines[-1]["eval/aacc"] <= 1
    classes = json.loads((straight / "per_class.json").read_text())["classes"]
    assert list(classes) == [f"thing {i}" for i in range(1, 22)]


@pytest.mark.slow
def test_semantic_fpn_stops_and_goes_on(fpn, straight_fpn, tmp_path):
    start, _ = fpn
    program = start(tmp_path / "run", WORKER)
    program.read_until(f"step 2/{STEPS}")
    program.send(signal.SIGTERM)
    assert program.wait() == 75, program.output
    program = start(tmp_path / "run")
    assert program.wait() == 0, program.output
    assert "continuing after step" in program.output
    assert_equal_runs(tmp_path / "run", straight_fpn[0])


@pytest.fixture(scope="module")
def start(compiled, tmp_path_factory):
    """Starts UPerNet on ADE20K, in which an image to evaluate on is broken."""
    folder = mini_ade.write(tmp_path_factory.mktemp("ade"), train=8, val=4, sizes=SHAPES)
    damage(folder / "images" / "validation", 0)
    start = partial(begin, folder, compiled, "configs/upernet_small.py")
    return lambda workdir, *flags, **how: start(workdir, "--config.warmup_steps=2", *flags, **how)


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory):
    """The workdir of a run that nobody stopped."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    program = start(workdir)
    assert program.wait() == 0, program.output
    assert "does not decode" in program.output
    assert_every_shape_is_compiled_once(program.output, len(SHAPES))
    return workdir


@pytest.fixture(scope="module")
def stopped(start, tmp_path_factory):
    """The workdir of a run that was stopped while it evaluated for the first time."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    program = start(workdir)
    program.read_until(f"step {FIRST}/{STEPS}")
    program.send(signal.SIGTERM)
    assert program.wait() == 75, program.output
    assert f"stopped at step {FIRST} of {STEPS}, saved" in program.output
    assert not values(workdir, "eval/miou")
    return workdir


def evaluated(start, workdir, *flags, count=1, **options):
    """The measures of the weights that a run has, in another way."""
    run = start(workdir, "--config.eval_only=True", *flags, count=count, **options)
    assert run.wait() == (0 if count == 1 else [0] * count), run.output
    return {key: metrics(workdir)[-1][key] for key in MEASURES}


@pytest.mark.docs
def test_a_run_logs_measures_and_reports_every_class(straight):
    lines = metrics(straight)
    assert set(values(straight, "train/loss")) == set(range(1, STEPS + 1))
    assert {"train/pixel_accuracy", "train/auxiliary_loss"} <= lines[0].keys()
    found = [line for line in lines if "eval/miou" in line]
    assert [line["step"] for line in found] == [FIRST, STEPS]
    for line in found:
        assert set(MEASURES) <= line.keys()
        assert line["eval/count"] == 4 and line["eval/unreadable"] == 1
        assert line["eval/unlabelled"] == 0  # whose pixels are wrong
        assert all(0 <= line[key] <= 1 for key in MEASURES[:3])
    rates = list(values(straight, "train/learning_rate").values())
    base = 6e-5 * 8 / 16  # for 8 images
    assert rates[0] == pytest.approx(base * 1e-6, rel=1e-12)
    assert rates[3] == pytest.approx(base * 3 / STEPS, rel=1e-12)
    assert rates[-1] == pytest.approx(base / STEPS, rel=1e-12)
    classes = json.loads((straight / "per_class.json").read_text())
    labelled = sum(row["pixels"] for row in classes["classes"].values())
    assert labelled > np.sum(classes["confusion"]) > 0  # the broken picture's pixels have no answer
    assert (straight / "per_class.png").stat().st_size > 5000


@pytest.mark.docs
def test_stopped_while_it_evaluates_a_run_makes_up_for_it(start, straight, stopped, tmp_path):
    workdir = shutil.copytree(stopped, tmp_path / "run")
    program = start(workdir)
    assert program.wait() == 0, program.output
    assert_equal_runs(workdir, straight)


@pytest.mark.docs
def test_every_way_to_test_is_another(start, straight, tmp_path):
    own = {key: metrics(straight)[-1][key] for key in MEASURES}
    weights = f"--config.init_from={straight}"
    # A window that nothing exceeds is the whole.
    wide = "--config.segmentation.test=slide", "--config.image_size=96"
    assert evaluated(start, tmp_path / "wide", weights, *wide) == own
    # Of those of a crop's size a picture has several.
    slid = evaluated(start, tmp_path / "slid", weights, "--config.segmentation.test=slide")
    assert slid["eval/count"] == 4 and slid != own
    views = "--config.segmentation.test_scales=(0.5, 1.0)", "--config.segmentation.test_flip=True"
    several = evaluated(start, tmp_path / "views", weights, *views)
    assert several["eval/count"] == 4 and several != own


@pytest.mark.slow
def test_two_processes_are_one_run(start, straight, stopped, tmp_path):
    """On four devices each they go on from what one device has saved, and evaluate the same."""
    workdir = shutil.copytree(stopped, tmp_path / "run")
    run = start(workdir, count=2, devices=4)
    assert run.wait() == [0, 0], run.output
    assert f"continuing after step {FIRST}" in run.output
    ours, alone = (values(path, "train/loss") for path in (workdir, straight))
    assert ours == pytest.approx(alone, rel=1e-5) and set(ours) == set(range(1, STEPS + 1))
    assert ours != alone  # eight devices add in another order
    assert values(workdir, "eval/count") == {FIRST: 4, STEPS: 4}

    own = {key: metrics(straight)[-1][key] for key in MEASURES}
    copied = shutil.copytree(straight, tmp_path / "copied")
    assert evaluated(start, copied, count=2, devices=4) == own
