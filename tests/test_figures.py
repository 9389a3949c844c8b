"""`visualize` and `plot`, as people start them, on real weights, images and runs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

import stvit_jax
from stvit_jax import plot, visualize
from stvit_jax.checkpoints import weights
from stvit_jax.checkpoints.trained import load_trained
from stvit_jax.errors import UserError
from stvit_jax.models import settings
from tests.program import NARROW_SETTINGS, ROOT


def run(module: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"stvit_jax.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds `flower.jpg`."""
    folder = tmp_path_factory.mktemp("figures")
    Image.fromarray(load_sample_image("flower.jpg")).save(folder / "flower.jpg")
    return folder


@pytest.fixture(scope="module")
def network(folder: Path, random_variables) -> Path:
    """Weights of a narrow network, cells of 8 and 4 as in the published ones, for 64 pixels."""
    model = stvit_jax.create_model("stvit_small", num_classes=3, **NARROW_SETTINGS)
    variables = random_variables(model)
    stated = {"name": "stvit_small", "num_classes": 3} | NARROW_SETTINGS
    path = folder / "narrow.safetensors"
    found = weights.Weights(
        variables, settings.complete(variables, None, **stated), path, {}, image_size=64
    )
    weights.write(path, found)
    return path


@pytest.mark.docs
def test_visualize_draws_every_block_over_the_image(folder: Path, network: Path) -> None:
    output = folder / "look.png"
    arguments = ("--weights", network, folder / "flower.jpg", "--output", output)
    done = run("visualize", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}: {network} at 64 x 64 pixels, pixel 32,32\n"
    first = pixels(output)
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 1000
    visualize.main([*map(str, arguments), "--at", "5,60"])
    assert (pixels(output) != first).any(axis=-1).mean() > 0.01


@pytest.mark.docs
def test_visualize_takes_the_pixel_as_x_and_y(
    folder: Path, network: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    chosen = []

    def panels(stages, image, at):
        chosen.append((image.shape[:2], at))
        return drawn(stages, image, at)

    drawn = visualize.panels
    monkeypatch.setattr(visualize, "panels", panels)
    arguments = "--weights", str(network), str(folder / "flower.jpg"), "--image-size", "50x83"
    output = tmp_path / "x.png"
    visualize.main([*arguments, "--at", "80,3", "--output", str(output)])
    assert chosen == [((50, 83), (3, 80))]
    assert capsys.readouterr().out.endswith("at 83 x 50 pixels, pixel 80,3\n")


@pytest.mark.parametrize("size", [pytest.param((64,), marks=pytest.mark.slow), (50, 83)], ids=str)
def test_panels_are_what_the_network_computed(folder: Path, network: Path, size) -> None:
    """On grids that are no squares and that cells do not divide, at a corner."""
    trained = load_trained(network, kernels="plain")
    image = visualize.read_image(folder / "flower.jpg", size)
    stages = visualize.look(trained, image)
    maps = trained.model.apply(
        trained.variables, stvit_jax.data.normalize(image[None]), method="feature_maps"
    )
    assert [blocks[0].size for blocks in stages] == [m.shape[1:3] for m in maps]
    rows = visualize.panels(stages, image, (image.shape[0] - 1, image.shape[1] - 1))
    titles = [[panel.title.replace("\n", " ") for panel in row] for row in rows]
    assert [len([t for t in row if t.startswith("super tokens")]) for row in titles] == [1, 1, 0, 0]
    heads = [len([t for t in row if t.startswith("attention")]) for row in titles]
    assert heads == list(NARROW_SETTINGS["num_heads"])
    for row, stage in zip(rows, stages, strict=True):
        for panel in row[1:]:
            shown = panel.heat if panel.tokens is None else panel.tokens
            assert shown.shape == stage[0].size
        for panel in (p for p in row if p.title.startswith("attention")):
            if stage[0].association is None:
                np.testing.assert_allclose(panel.heat.sum(), 1, rtol=1e-5)


def test_mistakes_are_one_line(folder: Path, network: Path, tmp_path: Path) -> None:
    image = folder / "flower.jpg"
    (tmp_path / "no.jpg").write_text("no image")
    for arguments, message in (
        ((image, "--output", tmp_path / "x.txt"), "must end in one of .png"),
        ((image, "--output", tmp_path / "no" / "x.png"), "does not exist"),
        ((image, "--output", tmp_path / "x.png", "--at", "64,3"), "outside of the image of 64 x"),
        ((image, "--output", tmp_path / "x.png", "--image-size", "9y9"), "write N or NxM"),
        ((image, "--output", tmp_path / "x.png", "--image-size", "9999"), "1 to 2048"),
        ((image, "--output", tmp_path / "x.png", "--image-size", "2048"), "takes 2.0 GiB, more"),
        ((tmp_path / "no.jpg", "--output", tmp_path / "x.png"), "no.jpg is no image"),
        ((tmp_path / "nowhere", "--output", tmp_path / "x.png"), "cannot be read"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            visualize.main(["--weights", str(network), *map(str, arguments)])
    done = run("visualize", "--weights", tmp_path / "none", image, "--output", tmp_path / "x.png")
    assert (
        done.returncode == 1
        and done.stderr.count("\n") == 1
        and "there are no weights" in done.stderr
    )


def test_plot_draws_runs(straight: Path, tmp_path: Path) -> None:
    workdir = shutil.copytree(straight, tmp_path / "second", ignore=lambda *_: ["checkpoints"])
    with (workdir / "metrics.jsonl").open(
        "a"
    ) as file:  # what a run that was killed leaves, and others
        file.write('[1]\n{"step": 31, "epoch": 9, "eval/top1": 1, "eval_only": true}\n{"step": 3')
    output = tmp_path / "curves.png"
    done = run("plot", straight, workdir, "--output", output)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}: run, second\n"
    assert len(np.unique(pixels(output).reshape(-1, 3), axis=0)) > 100
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    drawn = plot.curves(workdir)
    assert drawn == plot.curves(straight)
    assert drawn["train/loss"][1] == [line["train/loss"] for line in lines if "train/loss" in line]
    assert drawn["eval_ema/top1"][0] == [x["epoch"] for x in lines if "eval_ema/top1" in x]
    axes = plot.draw({"a": drawn, "b": drawn}).axes
    titles = [panel.get_title() for panel in axes]
    assert titles == ["loss of the batches", "learning rate", "top-1 accuracy"]
    assert len(axes[2].lines) == 4  # raw and averaged, of both


def test_plot_draws_segmentation_and_names_with_dollars(tmp_path: Path) -> None:
    workdir = tmp_path / "$x$_{"  # no formula
    workdir.mkdir()
    lines = (
        {"step": s, "epoch": s / 2, "train/loss": 1 / s, "eval/miou": s / 9, "eval_ema/miou": s / 8}
        for s in (1, 2, 3)
    )
    (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    plot.main([str(workdir), "--output", str(tmp_path / "x.svg")])
    figure = plot.draw({workdir.name: plot.curves(workdir)})
    loss, miou = figure.axes
    assert (loss.get_title(), miou.get_title()) == ("loss of the batches", "mean IoU")
    assert [list(line.get_ydata()) for line in miou.lines] == [
        [s / 9 for s in (1, 2, 3)],
        [s / 8 for s in (1, 2, 3)],
    ]


def test_plot_names_mistakes(tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "x.png")]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text(
        '{"step": 1, "epoch": 1, "train/loss": NaN}\n'
    )
    for workdirs, message in (
        (["nowhere"], "is no workdir of a run"),
        (["empty"], "holds nothing to draw yet"),
        (["empty", "empty"], "named twice"),
    ):
        with pytest.raises(UserError, match=message):
            plot.main([*(str(tmp_path / name) for name in workdirs), *output])
