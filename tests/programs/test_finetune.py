"""Fine-tuning on a folder, as people start it: few pictures, of odd sizes, one class rare."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import stvit_jax
from tests.program import Program, digests, values

COUNTS = {"one": 26, "four": 22, "seven": 2}
DIGITS = {"one": 1, "four": 4, "seven": 7}


pytestmark = pytest.mark.docs  # a whole use of the project, as the documentation's pages are


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Fifty pictures to train on, under train/; and validation/, as some call it."""
    root = tmp_path_factory.mktemp("mine")
    digits, sizes = load_digits(), np.random.default_rng(0)
    for name, count in COUNTS.items():
        found = np.flatnonzero(digits.target == DIGITS[name])
        for split, chosen in (("train", found[:count]), ("validation", found[100:107])):
            (root / split / name).mkdir(parents=True)
            for i in chosen:
                width, height = sizes.integers(17, 70, 2)
                image = Image.fromarray((digits.images[i] / 16 * 255).astype(np.uint8))
                image.resize((width, height)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def finetune(folder: Path, straight: Path, compiled: dict[str, str]):
    """Runs it to its end from a network of the digits; returns what it printed."""

    def run(workdir: Path, *flags: str) -> str:
        program = Program(
            workdir,
            f"--config.data.dir={folder}",
            f"--config.init_from={straight}",
            "--config.data.workers=0",
            "--config.epochs=6",
            "--config.eval_every_epochs=2",
            "--config.checkpoint_keep=1",
            *flags,
            config="configs/finetune.py",
            **compiled,
        )
        assert program.wait() == 0, program.output
        return program.output

    return run


def test_a_folder_is_learned(finetune, folder: Path, straight: Path, tmp_path: Path) -> None:
    """The network follows the weights; the best is kept; every class is accounted for; resuming."""
    workdir = tmp_path / "run"
    output = finetune(workdir)
    assert f"there is no val/ in {folder}: validation/ is evaluated on" in output
    assert "is of stvit_tiny, for images of 32 pixels" in output
    config = json.loads((workdir / "config.json").read_text())
    assert (config["model"]["name"], config["image_size"]) == ("stvit_tiny", 32)
    assert json.loads((workdir / "classes.json").read_text()) == ["four", "one", "seven"]

    report = json.loads((workdir / "per_class.json").read_text())
    counts = np.array(report["confusion"])
    assert counts.shape == (3, 3) and counts.sum(axis=1).tolist() == [7, 7, 7]
    rates = [report["classes"][name]["accuracy"] for name in ("four", "one", "seven")]
    np.testing.assert_allclose(rates, np.diagonal(counts) / 7, atol=1e-6)
    top1 = max(values(workdir, key)[6] for key in ("eval/top1", "eval_ema/top1"))
    assert np.diagonal(counts).sum() / 21 == pytest.approx(top1)
    assert Image.open(workdir / "confusion.png").size[0] > 300

    best = json.loads((workdir / "best.json").read_text())
    scores = {
        step: max(values(workdir, key)[step] for key in ("eval/top1", "eval_ema/top1"))
        for step in (2, 4, 6)
    }
    assert best["score"] == max(scores.values()) and scores[best["step"]] == best["score"]
    kept = {int(path.name) for path in (workdir / "checkpoints").iterdir()}
    # The last step is saved before it is evaluated: the best up to then may still be there.
    assert {best["step"], 6} <= kept and len(kept) <= 2
    settings = {k: v for k, v in config["model"].items() if v is not None and k != "name"}
    model = stvit_jax.create_model("stvit_tiny", **settings | {"num_classes": 3})
    stvit_jax.load_weights(model, workdir / "checkpoints" / str(best["step"]), best["ema"])

    again = tmp_path / "again"
    finetune(again, "--config.steps=3")
    output = finetune(again)
    assert "continuing after step 3" in output
    assert digests(again, 6) == digests(workdir, 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag, learned",
    [
        ("--config.linear_probe=True", ("head/",)),
        ("--config.freeze_stages=1", ("layers_1/", "proj/", "norm/", "head/")),
    ],
)
def test_what_is_frozen_stays(flag: str, learned, finetune, straight: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    finetune(workdir, flag, "--config.steps=2", "--config.checkpoint_best=False")
    before, after = digests(straight, 30), digests(workdir, 2)
    changed = {name for name in after if after[name] != before.get(name)}
    changed = {n.removeprefix("params/") for n in changed if n.startswith(("params/", "batch_st"))}
    assert changed and all(name.startswith(learned) for name in changed)
    assert {name.split("/")[0] for name in changed} == {name.strip("/") for name in learned}


def test_no_weights_and_no_network_are_one_line(folder: Path, tmp_path: Path) -> None:
    program = Program(tmp_path, f"--config.data.dir={folder}", config="configs/finetune.py")
    assert program.wait() == 1
    assert program.output.splitlines()[-1].startswith("error: config.init_from is empty, and the")
