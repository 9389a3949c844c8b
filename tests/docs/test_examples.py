"""The examples, as people start them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from examples import embed
from stvit_jax.errors import UserError
from tests.program import ROOT

pytestmark = pytest.mark.docs


def run(*command: object, cwd: Path = ROOT, **options: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_embed_draws_neighbours(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(load_digits().images[:40]):
        Image.fromarray((image / 16 * 255).astype(np.uint8)).save(folder / f"{i:02}.png")
    shutil.copy(folder / "00.png", folder / "copy.png")
    output = tmp_path / "neighbours.png"
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("of these pictures")
    said = run("-m", "examples.embed", "--weights", straight, folder, "--output", output)
    assert said.splitlines() == [
        "left out: 1 files of suffix .txt (notes.txt)",
        f"{output}: neighbours among 41 images",
    ]
    with Image.open(output) as picture:
        pixels = np.asarray(picture)
    tiles = [pixels[:96, column * 100 : column * 100 + 96] for column in range(8)]
    np.testing.assert_array_equal(tiles[0], tiles[1])  # the copy is nearest
    assert all((tiles[0] != tile).any() for tile in tiles[2:])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--weights", "WORKDIR", "nowhere"), "there is no file or folder nowhere"),
        (("--weights", "nowhere", "FOLDER"), r"there are no weights at .*nowhere"),
        (("--weights", "WORKDIR", "FOLDER"), "holds 1 pictures that can be read: neighbours"),
    ],
)
def test_mistakes_of_embed_are_one_line(straight: Path, tmp_path: Path, arguments, words) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    given = {"WORKDIR": str(straight), "FOLDER": str(tmp_path)}
    flags = [given.get(text, text) for text in arguments] + ["--output", str(tmp_path / "x.png")]
    with pytest.raises(UserError, match=words):
        embed.main(flags)


@pytest.mark.parametrize("steps, right", [(2, 0), pytest.param(300, 93, marks=pytest.mark.slow)])
def test_dense_learns(steps: int, right: float, tmp_path: Path) -> None:
    said = run("-m", "examples.dense", "--output", tmp_path / "dense.png", "--steps", steps)
    assert float(said.split(";")[-1].split("%")[0]) > right
    assert Image.open(tmp_path / "dense.png").size == (768, 384)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    """On the run that it names: a short one of the network that the digits' config trains."""
    (tmp_path / "examples").mkdir()
    flags = ["--config.steps=2", "--config.data.workers=0", "--config.batch_size=64"]
    config = ROOT / "configs/digits.py"
    workdir = tmp_path / "runs/digits"
    run(ROOT / "train.py", "--config", config, "--workdir", workdir, *flags, cwd=tmp_path)
    notebook = json.loads((ROOT / "examples/tour.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 4 and not any(cell["outputs"] for cell in cells)
    script = tmp_path / "examples/tour.py"
    script.write_text("\n".join("".join(cell["source"]) for cell in cells))
    variables = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "HOME": str(tmp_path)}
    said = run(script, cwd=tmp_path / "examples", env=variables)
    assert said.count("a ") >= 8 and "(8, 8, 8, 32)" in said and "the same to" in said
