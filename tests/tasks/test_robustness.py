"""Evaluation on the robustness sets: each set's rules, and the whole way from set to metrics."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvit_jax import tasks
from stvit_jax.checkpoints import weights
from stvit_jax.checkpoints.weights import Weights
from stvit_jax.config import base
from stvit_jax.data.decode import eval_image
from stvit_jax.data.normalization import normalize
from stvit_jax.errors import UserError
from stvit_jax.models.settings import complete
from stvit_jax.models.stvit import STViT, create_model
from stvit_jax.tasks.robustness import accuracy, real_accuracy
from tests.mini_sets import picture, prepare
from tests.program import NARROW, TWO_STAGES, Program, metrics, values

IMAGES = 12
UNREADABLE = 4
LABELS = [2, 7, 2, 900, 7, 900, 2, 2, 7, 31, 31, 2]
REAL_LABELS = [[2], [], [5, 2], [900], [7], [1, 2, 3], [], [2], [8], [31], [30], [2]]


def image(number: int) -> bytes:
    return b"no image" if number == UNREADABLE else picture(number)


@pytest.fixture(scope="module")
def network(random_variables: Callable[..., dict], tmp_path_factory) -> tuple[STViT, dict, Path]:
    """A narrow ImageNet model, its variables and their file."""
    model = create_model("stvit_small", num_classes=1000, **TWO_STAGES)
    variables = random_variables(model)
    path = tmp_path_factory.mktemp("network") / "weights.safetensors"
    settings = complete(variables, None, "stvit_small", **TWO_STAGES)
    weights.write(path, Weights(variables, settings, Path("made"), {}))
    return model, variables, path


@pytest.fixture(scope="module")
def logits(network: tuple[STViT, dict, Path]) -> dict[int, np.ndarray]:
    """The network's, by the number of the readable image."""
    model, variables, _ = network
    readable = [i for i in range(IMAGES) if i != UNREADABLE]
    images = np.stack([eval_image(image(i), 32) for i in readable])
    computed = jax.jit(model.apply)(variables, normalize(jnp.asarray(images)))
    return dict(zip(readable, np.asarray(computed), strict=True))


@pytest.fixture(scope="module")
def labels(logits: dict[int, np.ndarray]) -> list[int]:
    """One for each image; that of image 1 is its third best of all classes, best of the subset."""
    return [LABELS[0], int(np.argsort(-logits[1])[2]), *LABELS[2:]]


@pytest.fixture(scope="module")
def real_labels(logits: dict[int, np.ndarray]) -> list[list[int]]:
    """Any number for each image; of images 0 and 5 what is predicted is among them."""
    sets = [list(given) for given in REAL_LABELS]
    for i in (0, 5):
        sets[i].append(int(logits[i].argmax()))
    return sets


@pytest.fixture(scope="module")
def data_dir(
    labels: list[int], real_labels: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The five sets, each of the same pictures."""
    path = tmp_path_factory.mktemp("sets")
    for name in ("imagenet_v2/matched-frequency", "imagenet_a", "imagenet_r", "imagenet_sketch"):
        examples = [
            {"image": image(i), "label": label, "file_name": str(i)}
            for i, label in enumerate(labels)
        ]
        prepare(name, path, {"test": examples})
    examples = [
        {"image": image(i), "file_name": str(i), "original_label": one, "real_label": several}
        for i, (one, several) in enumerate(zip(labels, real_labels, strict=True))
    ]
    prepare("imagenet2012_real", path, {"validation": examples})
    return path


def evaluate(config: str, workdir: Path, path: Path, data_dir: Path, *flags: str) -> Program:
    """Runs train.py with a config that evaluates, to its end."""
    program = Program(
        workdir,
        *NARROW,
        f"--config.init_from={path}",
        f"--config.data.dir={data_dir}",
        "--config.image_size=32",
        "--config.batch_size=8",
        "--config.group_size=0",
        "--config.dtype=float32",
        *flags,
        config=f"configs/{config}.py",
    )
    assert program.wait() == 0, program.output
    return program


def test_a_subset_leaves_other_classes_out() -> None:
    logits = np.array([[9.0, 1, 2, 8], [1, 5, 4, 9], [0, 3, 1, 2], [0, 1, 0, 0]])
    labels, readable = np.eye(4, dtype=bool)[[2, 1, 1, 1]], np.array([True, True, True, False])
    assert accuracy(logits, labels, readable)["top1"] == 1 / 4
    found = accuracy(logits, labels, readable, subset=True)
    assert found == {"top1": 3 / 4, "top5": 3 / 4, "classes": 2, "count": 4, "unreadable": 1}


def test_real_takes_any_label_and_drops_the_unlabelled() -> None:
    logits = np.eye(4)[[0, 1, 2, 3, 3]]
    labels = np.array([[k in right for k in range(4)] for right in ([3, 0], [], [1], [3], [3])])
    found = real_accuracy(logits, labels, np.array([True, True, True, True, False]))
    assert found == {"top1": 2 / 4, "classes": 4, "count": 4, "unreadable": 1}


def test_the_config_from_sets_and_weights_to_metrics(
    data_dir: Path, network, logits, labels, real_labels, tmp_path: Path
) -> None:
    program = evaluate("eval_robustness", tmp_path, network[2], data_dir)

    def found(key: str) -> float:
        (value,) = values(tmp_path, f"robustness/{key}").values()
        return value

    labelled = [i for i in range(IMAGES) if real_labels[i]]
    hits = [i for i in labelled if i in logits and logits[i].argmax() in real_labels[i]]
    assert found("imagenet2012_real/count") == len(labelled) < IMAGES
    assert found("imagenet2012_real/top1") == len(hits) / len(labelled) > 0
    for name in ("imagenet_v2", "imagenet_sketch"):  # all classes
        assert found(f"{name}/classes") == 1000 and found(f"{name}/count") == IMAGES
        ranks = [np.argsort(-logits[i]).tolist().index(labels[i]) for i in logits]
        assert found(f"{name}/top1") == np.sum(np.array(ranks) < 1) / IMAGES
        assert found(f"{name}/top5") == np.sum(np.array(ranks) < 5) / IMAGES
        assert found(f"{name}/top5") > found(f"{name}/top1")
    classes = sorted(set(labels))
    hits = [i for i in logits if classes[logits[i][classes].argmax()] == labels[i]]
    for name in ("imagenet_a", "imagenet_r"):
        assert found(f"{name}/classes") == len(classes)
        assert found(f"{name}/top1") == len(hits) / IMAGES > found("imagenet_v2/top1")
        assert found(f"{name}/unreadable") == 1
        assert f"{name}: top-1 {len(hits) / IMAGES:.4f}" in program.output


def test_a_set_that_only_tests_is_evaluated_by_its_name(
    data_dir: Path, network: tuple[STViT, dict, Path], tmp_path: Path
) -> None:
    """Without a training split, and without the name of its variant."""
    flags = ("--config.eval_only=True", "--config.data.name=imagenet_v2")
    evaluate("stvit_small", tmp_path, network[2], data_dir, *flags)
    (line,) = metrics(tmp_path)
    assert line["eval/count"] == IMAGES and line["eval/unreadable"] == 1


@pytest.mark.slow
def test_a_version_keeps_the_rules_of_the_set(
    data_dir: Path, network: tuple[STViT, dict, Path], labels, real_labels, tmp_path: Path
) -> None:
    names = ("imagenet_a:0.1.0", "imagenet2012_real:1.0.0", "imagenet_v2/matched-frequency:3.0.0")
    evaluate("eval_robustness", tmp_path, network[2], data_dir, f"--config.robustness={names}")
    (line,) = metrics(tmp_path)
    assert line["robustness/imagenet_a:0.1.0/classes"] == len(set(labels))
    assert line["robustness/imagenet2012_real:1.0.0/count"] == sum(map(bool, real_labels))
    assert line["robustness/imagenet_v2/matched-frequency:3.0.0/count"] == IMAGES


def test_mistakes_are_named(digits_dir: Path, tmp_path: Path) -> None:
    config = base()
    config.eval_only, config.data.dir, config.robustness = True, str(tmp_path), ("imagenet_r",)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))
    with pytest.raises(
        UserError,
        match=r"config.robustness: .*imagenet_r' is not prepared in .*download_and_prepare",
    ):
        tasks.build(config, mesh)
    config.data.dir = str(digits_dir)
    config.robustness = ("digits",)
    with pytest.raises(UserError, match="'digits', which has 10 classes"):
        tasks.build(config, mesh)
