"""The commands of a trained network on a segmenter: real files, and what the network says."""

import functools
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import onnxruntime
import pytest
from PIL import Image

import stvit_jax
from stvit_jax import export, figures, predict, visualize
from stvit_jax.checkpoints.trained import load_trained
from stvit_jax.data import class_lists, normalize
from stvit_jax.data.annotations import IGNORED, read_annotation, write_annotation
from stvit_jax.data.pictures import whole_scene
from stvit_jax.errors import UserError
from stvit_jax.tasks.protocol import Protocol
from tests.mini_sets import picture
from tests.program import NARROW_SETTINGS, ROOT

NAMES = ("wall", "floor", "café", "sky")
SIDE = 32


MODEL = stvit_jax.create_segmenter(
    "upernet", "stvit_small", num_classes=len(NAMES), channels=8, **NARROW_SETTINGS
)


@functools.cache
def asked(window: int) -> Callable:
    """Scores as an evaluation has them, of variables, a view and the size of its picture."""

    def scores(variables: dict, view: jax.Array, size: jax.Array) -> jax.Array:
        apply = functools.partial(MODEL.apply, variables)
        return Protocol(window=window).scores(
            apply, [normalize(view[None])], size[None], (128, 128)
        )

    return jax.jit(scores)


trained = functools.cache(load_trained)


def labels(network: Path, view: np.ndarray, size: tuple[int, int], window: int = 0) -> np.ndarray:
    """The answer of the network as it was trained: (H, W)."""
    scores = asked(window)(trained(network).variables, view, np.array(size, np.int32))
    return np.asarray(scores)[0, : size[0], : size[1]].argmax(-1)


@pytest.fixture(scope="module")
def network(tmp_path_factory, random_variables) -> Path:
    """A shared folder of a narrow segmenter of four classes, all of which it sees."""
    variables = random_variables(MODEL)
    pixels, view = whole_scene(picture(0, (67, 41), "PNG"), SIDE)
    size = np.array(pixels.shape[:2], np.int32)
    scores = np.asarray(asked(0)(variables, view, size))[0, : size[0], : size[1]]
    variables["params"]["decode_head"]["conv_seg"]["bias"] -= np.median(scores, axis=(0, 1))
    path = tmp_path_factory.mktemp("network") / "scenes"
    stvit_jax.save_pretrained(path, MODEL, variables, classes=NAMES, image_size=SIDE)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two of one name, of 67 x 41 pixels and of those it is seen as; and one that is damaged."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "b").mkdir()
    (folder / "A.png").write_bytes(picture(0, (67, 41), "PNG"))
    (folder / "b" / "a.png").write_bytes(picture(1, (52, 32), "PNG"))
    (folder / "cut.jpg").write_bytes(picture(2)[:200])
    return folder


def test_predict_answers_as_the_test_protocol_does(network, pictures, tmp_path, capsys) -> None:
    output = tmp_path / "new" / "answers"
    arguments = ["--weights", str(network), str(pictures), "--output", str(output)]
    assert predict.main([*arguments, "--json"]) == 1
    captured = capsys.readouterr()
    source = f"{network}/model.safetensors"
    assert f"upernet on stvit_small of {source}, short sides of 32 pixels\n" in captured.err
    first, second, damaged = json.loads(captured.out)
    assert damaged["image"].endswith("cut.jpg") and set(damaged) == {"image", "error"}
    assert sorted(file.name for file in output.iterdir()) == [
        *("A.overlay.png", "A.png", "a-2.overlay.png", "a-2.png")
    ]
    palette = class_lists.palette(len(NAMES))
    for row, image, stem, factor in (
        (first, pictures / "A.png", "A", 3),
        (second, pictures / "b" / "a.png", "a-2", 4),
    ):
        files = (str(output / f"{stem}.png"), str(output / f"{stem}.overlay.png"))
        assert (row["image"], row["labels"], row["overlay"]) == (str(image), *files)
        label = read_annotation(Path(row["labels"]).read_bytes(), len(NAMES))
        pixels, view = whole_scene(image.read_bytes(), SIDE)
        expected = labels(network, view, pixels.shape[:2])
        assert label.shape == expected.shape and (label == expected).mean() > 0.995
        counts = np.bincount(label.ravel(), minlength=len(NAMES))
        assert np.count_nonzero(counts > 0.05 * label.size) >= 2
        found = [(each["label"], each["share"]) for each in row["classes"]]
        assert found == [(k, counts[k] / label.size) for k in np.argsort(-counts) if counts[k]]
        assert [each["name"] for each in row["classes"]] == [NAMES[k] for k, _ in found]
        with Image.open(row["labels"]) as coded:
            shown = np.asarray(coded.convert("RGB"))
        np.testing.assert_array_equal(shown, palette[label])
        over = figures.overlay(pixels, label, palette)
        over = over.repeat(factor, axis=0).repeat(factor, axis=1)
        with Image.open(row["overlay"]) as drawn:
            drawn = np.asarray(drawn)
        np.testing.assert_array_equal(drawn[: len(over), : over.shape[1]], over)
        beside = drawn[: figures.LINE * (len(found) + 1), over.shape[1] :].reshape(-1, 3)
        for k, _ in found:
            assert (beside == palette[k]).all(axis=1).sum() > 100
    predict.report(first)
    said, largest = capsys.readouterr().out.splitlines(), first["classes"][0]
    assert said[:2] == [first["image"], f"{largest['share']:9.2%}  {largest['name']}"]
    assert said[-1] == f"  in {first['labels']} and {first['overlay']}"
    with pytest.raises(UserError, match=r"answers/A\.png exists; remove it, or choose another"):
        predict.main(arguments)


def test_mistakes_are_one_line(network, pictures, tmp_path, random_variables) -> None:
    model = stvit_jax.create_model("stvit_small", num_classes=3, **NARROW_SETTINGS)
    stvit_jax.save_pretrained(tmp_path / "classifier", model, random_variables(model))
    (tmp_path / "file").write_text("")
    there = ["--output", str(tmp_path / "x")]
    for weights, arguments, message in (
        (network, [], "scenes/model.safetensors is of a segmenter: name a folder for its files"),
        (network, [*there, "--batch-size", "2"], "takes pictures one by one: leave out --batch"),
        (network, ["--output", str(tmp_path / "file")], "file cannot be created: Not a directory"),
        (tmp_path / "classifier", there, "is of a classifier, which writes no files: leave out"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            predict.main(["--weights", str(weights), str(pictures / "A.png"), *arguments])
    assert not (tmp_path / "x").exists()


def test_annotations_are_written_as_they_are_read() -> None:
    names, palette = class_lists.of_network(None, 150)
    assert names == class_lists.ade20k()[0] and palette[0].tolist() == [120, 120, 120]
    assert class_lists.of_network(names, 150)[1] is palette
    names, palette = class_lists.of_network(tuple(map(str, range(150))), 150)
    assert names[7] == "7" and palette[0].tolist() == [0, 0, 0]
    names, palette = class_lists.of_network(None, 254)
    assert names[7] == "class 7"
    label = np.array([*range(254), IGNORED, 3], np.uint8).reshape(2, 128)
    content = write_annotation(label, palette)
    np.testing.assert_array_equal(read_annotation(content, 254), label)
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == "P" and image.getpixel((0, 0)) == 1


@pytest.mark.docs
def test_visualize_shows_the_answer_and_the_backbone(network, pictures, tmp_path, capsys) -> None:
    image, output = pictures / "A.png", tmp_path / "look.png"
    arguments = ["--weights", str(network), str(image), "--output", str(output)]
    visualize.main(arguments)
    said = capsys.readouterr().out
    assert said == f"{output}: {network}/model.safetensors at 52 x 32 pixels, pixel 26,16\n"
    with Image.open(output) as drawn:
        # The answer, and a row for each of four stages.
        assert abs(drawn.height - 5 * (1.5 * 32 / 52 + 0.42) * 150) < 2
        assert len(np.unique(np.asarray(drawn.convert("RGB")).reshape(-1, 3), axis=0)) > 500
    seen = visualize.read_image(image, (SIDE,), whole=True)
    plain, over, legend = visualize.answer(trained(network), seen)
    label = labels(network, seen, (32, 52))
    palette = class_lists.palette(len(NAMES))
    np.testing.assert_array_equal(over.picture, figures.overlay(seen, label, palette))
    counts = np.bincount(label.ravel(), minlength=len(NAMES))
    largest = int(counts.argmax())
    assert legend.legend[0][0] == f"{NAMES[largest]} {counts[largest] / label.size:.1%}"
    assert len(legend.legend) == np.count_nonzero(counts)
    assert plain.picture is None
    with pytest.raises(UserError, match="would be seen at 2451 x 1500 pixels, and sides are at"):
        visualize.main([*arguments, "--image-size", "1500"])


@pytest.mark.docs
def test_an_onnx_model_of_a_segmenter(network, tmp_path, capsys) -> None:
    output = tmp_path / "scenes.onnx"
    export.main(["--weights", str(network), "--output", str(output)])
    assert float(re.search(r"within (\S+) of", capsys.readouterr().out)[1]) < 1e-5
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties["classes"]) == list(NAMES)
    (logits,) = session.run(None, {"images": np.zeros((2, SIDE, SIDE, 3), np.uint8)})
    assert logits.shape == (2, SIDE, SIDE, len(NAMES))


@pytest.mark.docs
def test_a_program_of_a_segmenter_runs_without_this_package(
    network, pictures, tmp_path, capsys
) -> None:
    output = tmp_path / "scenes.stvit"
    export.main(["--weights", str(network), "--output", str(output)])
    assert float(re.search(r"within (\S+) of", capsys.readouterr().out)[1]) < 1e-5
    with zipfile.ZipFile(output) as archive:
        meta = json.loads(archive.read("meta.json"))
    assert meta["output"] == {
        "dtype": "float32",
        "shape": ["batch", SIDE, SIDE, len(NAMES)],
        "meaning": "logits per pixel",
    }
    assert meta["classes"] == list(NAMES) and meta["network"]["head"] == "upernet"
    assert meta["palette"] == class_lists.palette(len(NAMES)).tolist()
    # The example slides windows over a picture, as the slide test does.
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in ("flax", "stvit_jax"))
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{blocked}")
    image = pictures / "b" / "a.png"  # its short side needs no resizing
    command = [sys.executable, ROOT / "examples/run_exported.py", output, image]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, *lines = done.stdout.splitlines()
    label = labels(network, np.asarray(Image.open(image)), (32, 52), window=SIDE)
    shares = np.bincount(label.ravel(), minlength=len(NAMES)) / label.size
    assert path == str(image) and len(lines) == len(NAMES)
    for line in lines:
        share, name = line.split()
        assert abs(float(share[:-1]) / 100 - shares[NAMES.index(name)]) < 0.002
