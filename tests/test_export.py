"""Exported networks: the same logits, without this package and without Flax."""

import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax
import jax.export
import numpy as np
import onnxruntime
import pytest

import stvit_jax
from stvit_jax import command_line, export, predict
from stvit_jax.checkpoints import weights
from stvit_jax.checkpoints.trained import load_trained
from stvit_jax.data import normalize
from stvit_jax.errors import UserError
from stvit_jax.models.settings import SETTINGS
from tests.mini_sets import picture
from tests.program import NARROW_SETTINGS, ROOT

EXAMPLE = ROOT / "examples" / "run_exported.py"
NAMES = tuple("abcdefg")
SIZE = 48


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory, random_variables: Callable) -> Path:
    """A file of a narrow network of seven classes, for pictures of 48 pixels."""
    model = stvit_jax.create_model(
        "stvit_small", num_classes=len(NAMES), **NARROW_SETTINGS | {"depths": (1, 2, 1, 1)}
    )
    settings = {"name": "stvit_small"} | {field: getattr(model, field) for field in SETTINGS}
    path = tmp_path_factory.mktemp("network") / "narrow.safetensors"
    found = weights.Weights(
        random_variables(model), settings, path, {}, classes=NAMES, image_size=SIZE
    )
    weights.write(path, found)
    return path


@pytest.fixture(scope="module")
def exported(network: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of it, by the command as people type it."""
    output = tmp_path_factory.mktemp("exported") / "narrow.zip"
    command = [sys.executable, "-m", "stvit_jax.export", "--weights", network, "--output", output]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = re.search(r"random pictures are within (\S+) of the network's", done.stdout)
    assert said and float(said[1]) < 1e-5, done.stdout
    return output


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate(((90, 70), (60, 100), (401, 301))):
        (folder / f"{number}.jpg").write_bytes(picture(number, size))
    return [str(path) for path in sorted(folder.iterdir())]


def answers(said: str) -> list[str]:
    """The lines of `predict` without how far it was, which a busy machine makes it say."""
    return [line for line in said.splitlines() if not line.startswith("predicting: ")]


def assert_example_agrees(output: str, network: Path, pictures: list[str], capsys) -> None:
    """Resizing by Pillow differs from ours by a level in a few pixels."""
    predict.main(["--weights", str(network), "--batch-size", "1", *pictures])
    ours = answers(capsys.readouterr().out)[1:]
    theirs = output.splitlines()
    assert len(ours) == len(theirs) == 6 * len(pictures)
    for mine, other in zip(ours, theirs, strict=True):
        if "%" not in mine:
            assert mine == other
            continue
        (p, name), (q, their_name) = mine.split(), other.split()
        assert name == their_name and abs(float(p[:-1]) - float(q[:-1])) < 0.1


def test_logits_of_any_number_of_pictures(network: Path, exported: Path) -> None:
    with zipfile.ZipFile(exported) as archive:
        program = jax.export.deserialize(bytearray(archive.read("program")))
    assert program.platforms == ("cpu", "cuda", "tpu")
    trained = load_trained(network)
    apply = jax.jit(trained.model.apply)
    images = np.random.default_rng(1).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    expected = np.asarray(apply(trained.variables, normalize(images)))
    logits = np.asarray(program.call(images))
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


def test_the_file_says_what_goes_in_and_comes_out(exported: Path) -> None:
    with zipfile.ZipFile(exported) as archive:
        meta = json.loads(archive.read("meta.json"))
    assert meta["input"] == {"dtype": "uint8", "shape": ["batch", 48, 48, 3], "channels": "RGB"}
    assert meta["output"]["shape"] == ["batch", 7]
    assert meta["classes"] == list(NAMES)
    assert meta["preprocessing"]["resize_short_side"] == 54  # 256 / 224 of 48
    assert meta["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert meta["network"]["embed_dim"] == [8, 8, 16, 16]


def test_the_example_runs_without_flax_and_this_package(
    network: Path, exported: Path, pictures: list[str], tmp_path: Path, capsys
) -> None:
    blocker = (
        "import sys\n"
        "for name in ('flax', 'stvit_jax', 'orbax', 'ml_collections', 'simplejpeg'):\n"
        "    sys.modules[name] = None\n"
    )
    (tmp_path / "sitecustomize.py").write_text(blocker)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    check = subprocess.run(
        [sys.executable, "-c", "import flax"], env=environment, capture_output=True
    )
    assert check.returncode != 0
    command = [sys.executable, str(EXAMPLE), str(exported), *pictures]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_example_agrees(done.stdout, network, pictures, capsys)


@pytest.mark.slow
def test_the_example_in_an_environment_of_jax_numpy_and_pillow(
    network: Path, exported: Path, pictures: list[str], tmp_path: Path, capsys
) -> None:
    venv.create(tmp_path / "own", with_pip=True)
    python = tmp_path / "own" / "bin" / "python"
    names = ("jax", "flatbuffers", "numpy", "pillow")
    wanted = [f"{name}=={metadata.version(name)}" for name in names]
    subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    command = [python, EXAMPLE, exported, *pictures]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_example_agrees(done.stdout, network, pictures, capsys)


@pytest.mark.docs
def test_an_onnx_model_by_onnxruntime(network: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "narrow.onnx"
    export.main(["--weights", str(network), "--output", str(output)])
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties["classes"]) == list(NAMES)
    assert json.loads(properties["preprocessing"])["centre_crop"] == SIZE
    trained = load_trained(network)
    images = np.random.default_rng(2).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    expected = np.asarray(jax.jit(trained.model.apply)(trained.variables, normalize(images)))
    (logits,) = session.run(None, {"images": images})
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


def test_onnx_without_its_package_names_it(network: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(UserError, match="pip install 'jax2onnx<0.14' onnxruntime"):
        export.main(["--weights", str(network), "--output", str(tmp_path / "x.onnx")])


@pytest.mark.slow
def test_a_small_picture_is_resized_whole(network: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(0, (90, 70)))
    output, size = tmp_path / "32.zip", ["--image-size", "32"]
    export.main(["--weights", str(network), "--output", str(output), *size])
    assert "for 32 x 32 pixels" in capsys.readouterr().out
    command = [sys.executable, str(EXAMPLE), str(output), str(tmp_path / "a.jpg")]
    example = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    predict.main(["--weights", str(network), *size, str(tmp_path / "a.jpg")])
    ours = answers(capsys.readouterr().out)[2:]
    assert [line.split()[1] for line in ours] == [x.split()[1] for x in example.splitlines()[1:]]


def test_a_program_that_differs_is_not_written(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(content: bytes) -> Callable:
        return lambda images: np.zeros((len(images), len(NAMES)), np.float32)

    monkeypatch.setattr(export.program, "loads", other)
    with pytest.raises(UserError, match="differs from the network by 1.0e"):
        export.main(["--weights", str(network), "--output", str(tmp_path / "x.zip")])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("there.zip", "there.zip exists; remove it, or choose another output"),
        ("gs://b/x.zip", "give a path on this machine"),
        ("there.zip/x", "there.zip/x cannot be written: Not a directory"),
    ],
)
def test_mistakes_are_one_line(
    network: Path, tmp_path: Path, output: str, message: str, monkeypatch, capsys
) -> None:
    (tmp_path / "there.zip").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command_line.entry(lambda: export.main(["--weights", str(network), "--output", output]))
    captured = capsys.readouterr()
    assert stopped.value.code == 1
    assert message in captured.err and captured.err.count("\n") == 1, captured.err
