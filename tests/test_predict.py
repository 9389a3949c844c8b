"""`predict` as people use it: real files, real weights, and what the network itself says."""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import stvit_jax
from stvit_jax import command_line, console, predict
from stvit_jax.checkpoints import weights
from stvit_jax.checkpoints.trained import load_trained
from stvit_jax.data import eval_image, normalize
from stvit_jax.errors import UserError
from stvit_jax.models.settings import SETTINGS
from tests.mini_sets import picture
from tests.program import NARROW_SETTINGS, ROOT

NAMES = tuple("abcdefg")
SIZE = 48


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory, random_variables: Callable) -> Path:
    """A file of a narrow network of seven classes, for pictures of 48 pixels."""
    model = stvit_jax.create_model("stvit_small", num_classes=len(NAMES), **NARROW_SETTINGS)
    settings = {"name": "stvit_small"} | {field: getattr(model, field) for field in SETTINGS}
    path = tmp_path_factory.mktemp("network") / "narrow.safetensors"
    found = weights.Weights(random_variables(model), settings, path, {}, classes=NAMES)
    weights.write(path, dataclasses.replace(found, image_size=SIZE))
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures in folders in folders, and what is none."""
    folder = tmp_path / "pictures"
    (folder / "b" / "deep").mkdir(parents=True)
    (folder / ".thumbnails").mkdir()
    (folder / "a.jpg").write_bytes(picture(0, (90, 70)))
    (folder / "b" / "1.png").write_bytes(picture(1, (60, 100), "PNG"))
    (folder / "b" / "deep" / "2").write_bytes(picture(2, (48, 48)))
    (folder / "b" / "deep" / "3.JPEG").write_bytes(picture(3, (400, 30)))
    (folder / "c.webp").write_bytes(picture(4, (50, 50), "WEBP"))
    (folder / ".thumbnails" / "a.jpg").write_bytes(picture(0))
    (folder / "notes.txt").write_text("none")
    (folder / "b" / "again").symlink_to(folder)
    return folder


ORDER = ["a.jpg", "b/1.png", "b/deep/2", "b/deep/3.JPEG", "c.webp"]


@functools.cache
def _network(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    trained = load_trained(path)
    apply = jax.jit(trained.model.apply)
    return lambda crop: np.asarray(
        jax.nn.softmax(apply(trained.variables, normalize(crop[None])))[0]
    )


def direct(path: Path, file: Path, size: int) -> np.ndarray:
    """Probabilities of one picture, by the network as it was trained."""
    return _network(path)(eval_image(file.read_bytes(), size))


def run(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "stvit_jax.predict", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def rows(capsys: pytest.CaptureFixture, *arguments: str | Path) -> list[dict]:
    assert predict.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_progress_on_many_says_what_time_is_left(
    network: Path, pictures: Path, monkeypatch, capsys
) -> None:
    clock = itertools.count(100, 4)  # seconds, four later whenever it is read
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    predict.main(["--weights", str(network), str(pictures)])
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("predicting: ")]
    assert lines == ["predicting: 3/5, 0:00:08 left"]


def test_a_folder_as_json_is_what_the_network_says(network: Path, pictures: Path) -> None:
    done = run("--weights", network, "--json", pictures, "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["image"] for row in found] == [str(pictures / name) for name in ORDER]
    assert "left out: " in done.stderr and "1 files of suffix .txt (notes.txt)" in done.stderr
    assert "1 hidden or made by the system (.thumbnails)" in done.stderr
    for row in found:
        expected = direct(network, Path(row["image"]), SIZE)
        labels = [guess["label"] for guess in row["top"]]
        assert labels == list(np.argsort(-expected)[:5])
        assert [guess["name"] for guess in row["top"]] == [NAMES[label] for label in labels]
        ours = [guess["probability"] for guess in row["top"]]
        np.testing.assert_allclose(ours, expected[labels], rtol=1e-4)
    assert len({row["top"][0]["probability"] for row in found}) == len(ORDER)


def test_batches_and_the_size_of_the_crop(
    network: Path, pictures: Path, capsys: pytest.CaptureFixture
) -> None:
    files = [pictures / name for name in ORDER[:3]]
    found = rows(capsys, "--weights", network, "--image-size", "40", *files)
    again = rows(capsys, "--weights", network, "--image-size", "40", "--batch-size", "1", *files)
    for row, other, file in zip(found, again, files, strict=True):
        top, expected = row["top"][0], direct(network, file, 40)
        assert top["probability"] == pytest.approx(expected.max(), rel=1e-4)
        assert top["probability"] == pytest.approx(other["top"][0]["probability"], rel=1e-5)


def test_what_a_person_reads(network: Path, pictures: Path) -> None:
    (pictures / "cut.jpg").write_bytes(picture(5)[:200])
    done = run("--weights", network, "a.jpg", "cut.jpg", "c.webp", cwd=pictures)
    assert done.returncode == 1
    # A busy machine makes it say how far it is.
    lines = [line for line in done.stdout.splitlines() if not line.startswith("predicting: ")]
    assert lines[0] == f"stvit_small of {network}, 48 x 48 pixels"
    assert (lines[1], lines[7], len(lines)) == ("a.jpg", "c.webp", 13)
    expected = direct(network, pictures / "a.jpg", SIZE)
    assert lines[2] == f"{expected.max():9.2%}  {NAMES[expected.argmax()]}"
    errors = done.stderr.splitlines()
    assert errors[-2].startswith("cut.jpg cannot be read: ")
    assert errors[-1] == "1 of 3 pictures cannot be read"


def test_unreadable_pictures_are_named_in_json(
    network: Path, pictures: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ORDER:
        if (pictures / name).suffix != ".png":
            (pictures / name).write_bytes(b"<html>" if "." in name else b"\xff\xd8\xff")
    assert predict.main(["--weights", str(network), "--json", str(pictures)]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert ["error" in row for row in found] == [True, False, True, True, True]
    assert "an HTML page" in found[0]["error"]
    assert "4 of 5 pictures cannot be read" in captured.err


def test_the_workdir_of_a_run_knows_its_classes(
    straight: Path, digits_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    image = np.kron(np.eye(8, dtype=np.uint8) * 255, np.ones((4, 4), np.uint8))
    Image.fromarray(image).save(tmp_path / "diagonal.png")
    (raw,) = rows(capsys, "--weights", straight, tmp_path)
    (ema,) = rows(capsys, "--weights", straight, tmp_path, "--ema")
    assert {guess["name"] for guess in raw["top"]} <= set("0123456789")
    assert sum(guess["probability"] for guess in raw["top"]) <= 1
    assert raw["top"] != ema["top"]
    expected = direct(straight, tmp_path / "diagonal.png", 32)
    assert raw["top"][0]["probability"] == pytest.approx(expected.max(), rel=1e-4)


def test_tensorflow_is_not_imported(network: Path, pictures: Path, tmp_path: Path) -> None:
    stand_in = tmp_path / "path" / "tensorflow"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").write_text("import os\nos._exit(9)\n")
    code = "import sys, stvit_jax.predict as p; sys.exit(p.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--weights", str(network), str(pictures / "a.jpg")]
    environment = os.environ | {"PYTHONPATH": f"{stand_in.parent}:{ROOT}"}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jpg"], "there is no file or folder nowhere.jpg"),
        (["empty"], "there are no pictures in empty (left out: 1 files of suffix .txt (x.txt))"),
        (["gs://b/x.jpg"], "pictures are read from this machine: copy them"),
        (["a.jpg", "--weights", "none.pth"], "there are no weights at none.pth"),
        (["a.jpg", "--image-size", "0"], "--image-size is 0; it must be at least 1"),
        (["a.jpg", "--weights", "headless.safetensors"], "has no head, so there is nothing that"),
        (["a.jpg", "--ema"], "narrow.safetensors"),
    ],
)
def test_mistakes_are_one_line(
    network: Path,
    pictures: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(pictures)
    (pictures / "empty").mkdir()
    (pictures / "empty" / "x.txt").write_text("none")
    if "headless.safetensors" in arguments:
        with safetensors.safe_open(network, "np") as file:
            kept = [name for name in file.keys() if not name.startswith("head.")]
            tensors = {name: file.get_tensor(name) for name in kept}
            safetensors.numpy.save_file(tensors, "headless.safetensors", file.metadata())
    with pytest.raises(SystemExit) as stopped:
        command_line.entry(lambda: predict.main(["--weights", str(network), *arguments]))
    captured = capsys.readouterr()
    assert stopped.value.code == 1
    assert message in captured.err and captured.err.count("\n") == 1, captured.err


def test_a_network_of_grey_pictures_is_refused(
    random_variables: Callable, tmp_path: Path, pictures: Path
) -> None:
    model = stvit_jax.create_model("stvit_small", in_chans=1, num_classes=3, **NARROW_SETTINGS)
    settings = {"name": "stvit_small"} | {field: getattr(model, field) for field in SETTINGS}
    path = tmp_path / "grey.safetensors"
    weights.write(path, weights.Weights(random_variables(model), settings, path, {}))
    with pytest.raises(UserError, match="is a network of 1 channels, and pictures have 3"):
        predict.main(["--weights", str(path), str(pictures / "a.jpg")])
