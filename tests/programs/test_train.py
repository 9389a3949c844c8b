"""train.py as a process on the digits: what it leaves, and that it survives being stopped."""

from functools import partial

import jax
import numpy as np
import pytest

import convert_torch_weights
import stvit_jax
from stvit_jax.checkpoints import fit, weights
from stvit_jax.data.sources import open_source
from stvit_jax.models import settings
from tests.program import STEPS, Program, assert_equal_runs, digests, metrics, values


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
    """The association of the sampled stage is not the uniform 1/9."""
    found = fit.identify(weights.read(straight))
    model = settings.create(found.settings)
    source = open_source("tfds", "digits", str(digits_dir), train=False)
    images = np.stack([stvit_jax.data.eval_image(source[i]["image"], 32) for i in range(8)])
    apply = partial(model.apply, method="feature_maps", mutable=["intermediates"])
    _, state = jax.jit(apply)(found.variables, stvit_jax.data.normalize(images))
    attn = state["intermediates"]["layers_0"]["blocks_0"]["attn"]
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


@pytest.mark.docs
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
        for key in ("eval/top1", "eval/top5", "eval/count"):
            assert line[key] == before[key], key
        # Of the folded network, which rounds in other places.
        assert line["eval/loss"] == pytest.approx(before["eval/loss"], rel=1e-5)
        assert "eval_ema/top1" not in line  # a file holds one set of weights


@pytest.mark.slow
def test_starts_from_weights_raw_or_averaged(start, straight, tmp_path):
    flags = ("--config.steps=2", f"--config.init_from={straight}", "--config.init_from_ema=True")
    program = start(tmp_path, *flags)
    assert program.wait() == 0, program.output
    assert f"starting from {straight / 'checkpoints' / str(STEPS)}" in program.output
    assert values(tmp_path, "train/loss")[1] != values(straight, "train/loss")[1]
    compiled = {"JAX_DUMP_IR_TO": str(tmp_path / "compiled")}
    program = start(tmp_path / "ema", "--config.eval_only=True", *flags, **compiled)
    assert program.wait() == 0, program.output
    (line,), before = metrics(tmp_path / "ema"), metrics(straight)[-1]
    for key in ("top1", "top5"):
        assert line[f"eval/{key}"] == before[f"eval_ema/{key}"], key
    assert line["eval/loss"] == pytest.approx(before["eval_ema/loss"], rel=1e-5)
    # The network is folded: of its norms, the LayerNorm of each block is left.
    (measure,) = (tmp_path / "compiled").glob("*measure*")
    assert measure.read_text().count("stablehlo.rsqrt") == 2


@pytest.mark.slow
def test_a_run_of_a_version_that_kept_no_state_of_evaluations_goes_on(start, straight, tmp_path):
    program = start(tmp_path, "--config.steps=25")
    assert program.wait() == 0, program.output
    for name in ("evaluations.json", "classes.json"):
        (tmp_path / name).unlink()
    program = start(tmp_path)
    assert program.wait() == 0, program.output
    assert digests(tmp_path, STEPS) == digests(straight, STEPS)
    assert list(values(tmp_path, "eval/top1")) == [22, 25, 30]


@pytest.mark.slow
def test_a_run_with_another_seed_compiles_nothing_anew(start, tmp_path):
    """But for what makes its key, which takes no time. Kept in the user's cache folder."""
    caches = {
        "JAX_COMPILATION_CACHE_DIR": None,
        "XDG_CACHE_HOME": str(tmp_path / "caches"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    folder, kept = tmp_path / "caches/stvit_jax", []
    for seed in (0, 1):
        flags = ("--config.steps=1", f"--config.seed={seed}")
        program = start(tmp_path / f"run{seed}", *flags, **caches)
        assert program.wait() == 0, program.output
        assert program.output.count(f"compiled programs are kept in {folder}\n") == 1
        kept.append({path.name for path in folder.iterdir()})
    assert {"jit_train_step", "jit_measure"} <= {name.split("-")[0] for name in kept[0]}
    assert {name.split("-")[0] for name in kept[1] - kept[0]} == {"jit_key"}


@pytest.mark.slow
def test_trains_where_tensorflow_is_missing(start, straight, tmp_path):
    """Prepares the data, too."""
    workdir = tmp_path / "run"
    program = start(workdir, f"--config.data.dir={tmp_path / 'data'}")
    assert program.wait() == 0, program.output
    assert program.output.count("no TensorBoard files") == 1
    assert not list(workdir.glob("events*"))
    assert_equal_runs(workdir, straight)


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
