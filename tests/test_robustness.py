"""Evaluation on the robustness sets: each set's rules, and the whole way from set to metrics."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from stvit_jax import robustness, weights
from stvit_jax.config import base
from stvit_jax.data.decode import eval_image
from stvit_jax.data.normalization import normalize
from stvit_jax.errors import UserError
from stvit_jax.model import create_model
from stvit_jax.robustness import accuracy, real_accuracy
from stvit_jax.settings import complete
from stvit_jax.signals import Stop
from stvit_jax.weights import Weights
from tests.mini_imagenet import class_names
from tests.program import values

IMAGES = 12
UNREADABLE = 4
LABELS = [2, 7, 2, 900, 7, 900, 2, 2, 7, 31, 31, 2]
REAL_LABELS = [[2], [], [5, 2], [900], [7], [1, 2, 3], [], [2], [8], [31], [30], [2]]


def picture(number: int) -> bytes:
    if number == UNREADABLE:
        return b"no image"
    pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


class MiniatureBuilder(tfds.core.GeneratorBasedBuilder):
    """The features of tfds's own builders, which download what they prepare."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        real = self.name == "imagenet2012_real"
        one = tfds.features.ClassLabel(names=class_names())
        labels = {"original_label": one, "real_label": tfds.features.Sequence(one)}
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {"image": tfds.features.Image(encoding_format="jpeg")}
                | (labels if real else {"label": one})
            ),
            supervised_keys=("image", "real_label" if real else "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        split = "validation" if self.name == "imagenet2012_real" else "test"
        return {split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        for i in range(IMAGES):
            labels = {"original_label": LABELS[i], "real_label": REAL_LABELS[i]}
            known = self.info.features
            yield (
                i,
                {"image": picture(i)}
                | {
                    key: value
                    for key, value in (labels | {"label": LABELS[i]}).items()
                    if key in known
                },
            )


class Imagenet2012Real(MiniatureBuilder):
    pass


class ImagenetA(MiniatureBuilder):
    pass


class ImagenetSketch(MiniatureBuilder):
    pass


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    for builder in (Imagenet2012Real, ImagenetA, ImagenetSketch):
        builder(data_dir=str(tmp_path)).download_and_prepare(file_format="array_record")
    return tmp_path


def test_a_subset_leaves_other_classes_out() -> None:
    logits = np.array([[9.0, 1, 2, 8], [1, 5, 4, 9], [0, 3, 1, 2], [0, 1, 0, 0]])
    labels, readable = np.array([2, 1, 1, 1]), np.array([True, True, True, False])
    assert accuracy(logits, labels, readable)["top1"] == 1 / 4
    found = accuracy(logits, labels, readable, np.array([1, 2]))
    assert found == {"top1": 3 / 4, "top5": 3 / 4, "classes": 2, "count": 4, "unreadable": 1}


def test_real_takes_any_label_and_drops_the_unlabelled() -> None:
    logits = np.eye(4)[[0, 1, 2, 3, 3]]
    sets = [np.array(labels, int) for labels in ([3, 0], [], [1], [3], [3])]
    found = real_accuracy(logits, sets, np.array([True, True, True, True, False]))
    assert found == {"top1": 2 / 4, "classes": 4, "count": 4, "unreadable": 1}


def test_from_sets_and_weights_to_metrics(
    data_dir: Path, random_variables: Callable[..., dict], tmp_path: Path
) -> None:
    narrow = dict(embed_dim=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
    model = create_model("stvit_small", projection=16, num_classes=1000, **narrow)
    variables = random_variables(model)
    config = base()
    config.model.update(narrow | {"projection": 16})
    config.image_size, config.batch_size, config.group_size = 32, 8, 0
    config.dtype = "float32"
    config.data.dir = str(data_dir)
    config.robustness = ("imagenet2012_real", "imagenet_a", "imagenet_sketch")
    config.init_from = str(tmp_path / "weights.safetensors")
    settings = complete(variables, None, "stvit_small", projection=16, **narrow)
    weights.write(config.init_from, Weights(variables, settings, Path("made"), {}))
    assert robustness.run(config, tmp_path / "run", Stop()) == 0

    readable = [i for i in range(IMAGES) if i != UNREADABLE]
    images = np.stack([eval_image(picture(i), 32) for i in readable])
    computed = jax.jit(model.apply)(variables, normalize(jnp.asarray(images)))
    logits = dict(zip(readable, np.asarray(computed), strict=True))

    def found(key: str) -> float:
        (value,) = values(tmp_path / "run", f"robustness/{key}").values()
        return value

    labelled = [i for i in range(IMAGES) if REAL_LABELS[i]]
    assert found("imagenet2012_real/count") == len(labelled)
    assert found("imagenet2012_real/top1") == np.mean(
        [i in logits and logits[i].argmax() in REAL_LABELS[i] for i in labelled]
    )
    assert found("imagenet_sketch/top5") == np.mean(
        [i in logits and LABELS[i] in np.argsort(-logits[i])[:5] for i in range(IMAGES)]
    )
    classes = sorted(set(LABELS))
    assert found("imagenet_a/classes") == len(classes)
    expected = [
        i in logits and classes[logits[i][classes].argmax()] == LABELS[i] for i in range(IMAGES)
    ]
    assert found("imagenet_a/top1") == np.mean(expected) > 0
    assert found("imagenet_a/unreadable") == 1


def test_mistakes_are_named(data_dir: Path, digits_dir: Path, tmp_path: Path) -> None:
    config = base()
    config.data.dir = str(data_dir)
    config.robustness = ("imagenet_r",)
    with pytest.raises(UserError, match="init_from is empty"):
        robustness.run(config, tmp_path / "run", Stop())
    config.init_from = "weights.pth"
    with pytest.raises(UserError, match=r"imagenet_r' is not prepared in .*download_and_prepare"):
        robustness.run(config, tmp_path / "run", Stop())
    config.data.dir = str(digits_dir)
    config.robustness = ("digits",)
    with pytest.raises(UserError, match="'digits', which has 10 classes"):
        robustness.run(config, tmp_path / "run", Stop())
