"""The task: what a crop becomes, what is lost on it, what is counted, which weights fit."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stvit_jax
from stvit_jax import parallel, plans, recipes
from stvit_jax.checkpoints.weights import Weights
from stvit_jax.data.normalization import normalize
from stvit_jax.errors import UserError
from stvit_jax.ops import resize
from stvit_jax.tasks import pixels
from stvit_jax.tasks import segmentation as task
from stvit_jax.tasks.protocol import Protocol
from stvit_jax.trees import leaves
from tests import mini_ade
from tests.program import NARROW_SETTINGS

K = 5
EPSILON = float(np.finfo(np.float32).eps)  # what mmsegmentation adds to a divisor


def network(kind="upernet", **more):
    how = dict(channels=8, dropout=0.0, num_classes=K) | NARROW_SETTINGS | more
    return stvit_jax.create_segmenter(kind, "stvit_tiny", **how)


def batch(side=32):
    rng = np.random.default_rng(0)
    label = rng.integers(0, K, (2, side, side)).astype(np.uint8)
    label[0, :9], label[1, 20:], label[1, :, 30:] = 255, 255, 255
    return {
        "image": rng.integers(0, 256, (2, side, side, 3), np.uint8),
        "label": label,
        "size": np.array([[side, side], [20, 30]], np.int32),
    }


def test_beyond_a_scene_the_network_sees_zeros():
    given = batch()
    made = task.prepare(False, given, jax.random.key(0))
    np.testing.assert_array_equal(made["image"][0], normalize(given["image"][0]))
    np.testing.assert_array_equal(
        made["image"][1, :20, :30], normalize(given["image"])[1, :20, :30]
    )
    assert not made["image"][1, 20:].any() and not made["image"][1, :, 30:].any()
    distorted = task.prepare(True, given, jax.random.key(0))["image"]
    assert np.abs(distorted[1] - made["image"][1]).max() > 0.1
    assert not distorted[1, 20:].any() and np.isfinite(distorted).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["upernet", "fpn"])
def test_the_loss_is_that_of_all_heads_at_the_labels_size(kind, random_variables):
    """Of both that UPerNet has, of the only one of Semantic FPN."""
    model = network(kind, dtype=jnp.float64)
    variables = jax.tree.map(partial(np.asarray, dtype=np.float64), random_variables(model))
    given = task.prepare(False, batch(), jax.random.key(0)) | {"row": jnp.arange(2)}
    given["image"] = given["image"].astype(jnp.float64)
    loss = task.objective(model, 0.0, 0.4, False)

    @jax.jit  # one program: what they share is compiled once
    def both(params, batch_stats, given):
        key = jax.random.key(1)
        logits, _ = model.apply(
            {"params": params, "batch_stats": batch_stats},
            given["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
            method="head_logits",
        )
        return loss(params, batch_stats, given, key, 0), logits

    (value, (stats, scalars)), logits = both(variables["params"], variables["batch_stats"], given)
    expected, auxiliary = 0.0, kind == "upernet"
    assert (logits.auxiliary is not None) == ("auxiliary_loss" in scalars) == auxiliary
    for weight, part in ((1, logits.main), (0.4, logits.auxiliary))[: 1 + auxiliary]:
        log = np.asarray(jax.nn.log_softmax(resize.bilinear(part, (32, 32))))
        label = given["label"].astype(int)
        own = -np.take_along_axis(log, np.where(label == 255, 0, label)[..., None], -1)[..., 0]
        expected += weight * np.where(label == 255, 0, own).sum() / (label.size + EPSILON)
    assert float(value) == pytest.approx(expected, rel=1e-12)
    answers = np.argmax(resize.bilinear(logits.main, (32, 32)), -1)
    right = np.asarray(answers == given["label"])[given["label"] != 255]
    accuracy = right.sum() / (right.size + EPSILON)
    assert float(scalars["pixel_accuracy"]) == pytest.approx(accuracy, rel=1e-12)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), stats, variables["batch_stats"])
    assert all(jax.tree.leaves(changed))


def test_a_frozen_backbone_s_statistics_and_their_scales_stay(random_variables):
    model = network(freeze_bn=True)
    variables = random_variables(model)
    held = task.unless_frozen(model, variables["params"])
    stem, block = held["backbone"]["patch_embed"], held["backbone"]["layers_0"]["blocks_0"]
    assert not any(jax.tree.leaves(stem["proj_2"])) and all(jax.tree.leaves(stem["proj_0"]))
    assert not any(jax.tree.leaves(block["norm2"])) and all(jax.tree.leaves(block["norm1"]))
    assert all(jax.tree.leaves(held["decode_head"])) and all(jax.tree.leaves(held["norm_0"]))

    given = task.prepare(False, batch(), jax.random.key(0)) | {"row": jnp.arange(2)}
    loss = jax.jit(task.objective(model, 0.0, 0.4, False))
    params, before = variables["params"], variables["batch_stats"]
    _, (stats, _) = loss(params, before, given, jax.random.key(1), 0)
    same = jax.tree.map(lambda a, b: bool(np.all(a == b)), stats, before)
    assert all(jax.tree.leaves(same["backbone"])) and not any(jax.tree.leaves(same["decode_head"]))


def test_counts_are_of_every_pixel_of_a_picture_and_no_other(random_variables):
    model = network()
    variables = random_variables(model)
    rng = np.random.default_rng(2)
    sizes = np.array([[40, 50], [33, 61], [64, 64], [20, 30], [0, 0]])
    given = {
        "image_0": rng.integers(0, 256, (5, 24, 32, 3), np.uint8),
        "label": rng.integers(0, K, (5, 64, 64)).astype(np.uint8),
        "size": sizes.astype(np.int32),
        "mask": np.array([True, True, True, True, False]),
        "unreadable": np.array([0, 1, 0, 1, 0], np.int32),
    }
    given["label"][0, 5:9] = 255
    given["label"][3, :20, :30] = 255  # as where an annotation does not decode
    counts = jax.jit(partial(pixels.measure, model, Protocol()))(variables, given)
    assert (counts["count"], counts["unreadable"], counts["unlabelled"]) == (4, 2, 1)
    expected = np.zeros((K, K + 1), int)
    logits = jax.jit(model.apply)(variables, normalize(given["image_0"]))
    for i, (height, width) in enumerate(sizes[:3]):
        answers = np.argmax(resize.bilinear(logits[i : i + 1], (height, width))[0], -1)
        answers = np.full_like(answers, K) if i == 1 else answers
        label = given["label"][i, :height, :width]
        np.add.at(expected, (label[label != 255], answers[label != 255]), 1)
    difference = np.abs(np.asarray(counts["confusion"]) - expected)
    assert difference.sum() <= 4  # pixels whose two best classes are equal but for rounding
    assert counts["confusion"].sum() == expected.sum() == 40 * 50 - 4 * 50 + 33 * 61 + 64 * 64

    metrics = pixels.finish(pixels.add(None, counts))
    assert metrics["aacc"] == pytest.approx(np.trace(expected) / expected.sum(), abs=1e-3)
    assert metrics["count"] == 4 and 0 < metrics["miou"] < metrics["aacc"] + 0.1
    said = pixels.describe(metrics)
    assert said.startswith(f"mIoU {metrics['miou']:.4f} aAcc ")
    assert said.endswith("(4 images, 2 of them unreadable, 1 without a labelled pixel)")
    assert "labelled" not in pixels.describe(metrics | {"unlabelled": 0})
    counted = {"count": 2, "unlabelled": 0}
    with pytest.raises(UserError, match="none of the 2 images"):
        pixels.finish(counted | {"unreadable": 2, "confusion": expected})
    with pytest.raises(UserError, match="no pixel of the 2 images"):
        pixels.finish(counted | {"unreadable": 0, "confusion": 0 * expected})


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The task of a published recipe, on a miniature of ADE20K."""
    folder = tmp_path_factory.mktemp("ade")
    mini_ade.write(folder)
    config = recipes.ade20k("")
    config.model.name, config.segmentation.channels = "stvit_tiny", 8
    config.model.update(NARROW_SETTINGS)
    config.image_size, config.segmentation.short_side = 64, 64
    config.data.dir, config.dtype = str(folder), "float32"
    return config, task.task(config, built_mesh(config))


def built_mesh(config):
    return parallel.make_mesh(config.batch_size, devices=jax.devices()[:1])


def test_every_field_reaches_the_task(built):
    """With values that are nobody's default."""
    config = built[0].copy_and_resolve_references()
    config.model.drop_path_rate, config.data.flip, config.remat = 0.3, False, (1,)
    own = config.segmentation
    own.head, own.channels, own.dropout, own.freeze_bn = "fpn", 12, 0.2, True
    own.auxiliary_weight, own.mean_of_labelled = 0.7, True
    own.long_side, own.short_side, own.scale_range = 96, 48, (0.9, 1.1)
    own.largest_class, own.photometric = 0.6, False
    own.test, own.test_scales, own.test_flip = "slide", (0.5, 1.5), True
    made = task.task(config, built_mesh(config))

    (cut,) = made.train.load.args
    assert cut.keywords == {
        "size": 64,
        "classes": 150,
        "scale_range": (0.9, 1.1),
        "long": 96,
        "short": 48,
        "largest_class": 0.6,
        "flip": False,
    }
    assert made.prepare.args == (False,) and made.what == "fpn on stvit_tiny"
    told = inspect.getclosurevars(made.objective).nonlocals
    model = told.pop("model")
    assert told == {"drop_path_rate": 0.3, "auxiliary_weight": 0.7, "mean_of_labelled": True}
    assert (model.dropout, model.channels, model.num_classes) == (0.2, 12, 150)
    assert (model.backbone.freeze_bn, model.backbone.remat) == (True, (1,))
    assert made.multipliers is not None and built[1].multipliers is None
    (evaluation,) = made.evaluations
    of, protocol = evaluation.measure.args
    assert of == model and protocol == Protocol((0.5, 1.5), True, 64)
    (resized,) = evaluation.examples.load.args
    assert resized.keywords == {"classes": 150, "ratios": (0.5, 1.5), "long": 96, "short": 48}


def test_what_is_frozen_is_not_decayed_either(built, random_variables):
    """A step of the run's own optimiser, with gradients and a large decay everywhere."""
    config = built[0].copy_and_resolve_references()
    config.segmentation.freeze_bn, config.decay, config.weight_decay = True, "all", 10.0
    config.learning_rate, config.warmup_steps = 512 / config.batch_size * 0.01, 0
    mesh = parallel.make_mesh(config.batch_size, devices=jax.devices()[:1])
    tx = plans.Plans.of(config, task.task(config, mesh)).tx
    variables = random_variables(task.create(config, mesh, 150, ""))
    params = variables["params"]

    @jax.jit
    def learn(params, gradients):
        updates, _ = tx.update(gradients, tx.init(params), params)
        return optax.apply_updates(params, updates)

    before, after = leaves(params), leaves(learn(params, jax.tree.map(np.ones_like, params)))
    stay = {path for path in before if np.array_equal(before[path], after[path])}
    normalised = leaves(variables["batch_stats"]["backbone"])
    modules = {path.rpartition("/")[0] for path in normalised}
    assert stay == {f"backbone/{m}/{name}" for m in modules for name in ("scale", "bias")}


def test_examples_are_what_their_specs_say_and_groups_hold_every_one_once(built):
    config, made = built
    rng = np.random.default_rng(0)
    for i in range(3):
        crop = made.train.load(made.train.source[i], rng)
        assert {k: (x.shape, x.dtype) for k, x in crop.items()} == {
            k: (shape, np.dtype(dtype)) for k, (shape, dtype) in made.train.spec.items()
        }
    evaluated = made.evaluations[0].examples
    assert sorted(np.concatenate([g.indices for g in evaluated.groups])) == list(
        range(len(evaluated.source))
    )
    assert len(evaluated.groups) > 1
    for group in evaluated.groups:
        assert not any(side % task.ROUNDED_TO for side in group.spec["label"][0])
        for index in group.indices:
            scene = evaluated.load(evaluated.source[index], None)
            assert {k: (x.shape, np.dtype(x.dtype)) for k, x in scene.items()} == {
                k: (shape, np.dtype(dtype)) for k, (shape, dtype) in group.spec.items()
            }
            assert tuple(scene["size"]) == tuple(evaluated.source.sizes()[index])


def test_a_sheet_shows_crops_under_their_labels(built):
    _, made = built
    rng = np.random.default_rng(0)
    crops = [made.train.load(made.train.source[i], rng) for i in range(2)]
    rows = made.sheet({k: np.stack([c[k] for c in crops]) for k in crops[0]}, jax.random.key(0))
    for crop, ((before, said), (after, named)) in zip(crops, rows, strict=True):
        np.testing.assert_array_equal(before, crop["image"])
        assert after.shape == (64, 64, 3) and np.abs(after.astype(int) - before).max() > 20
        assert said[0].endswith("classes") and named


def test_weights_are_adopted_by_what_they_are_of(built, random_variables, capsys):
    config, made = built
    mesh = parallel.make_mesh(config.batch_size, devices=jax.devices()[:1])
    model = task.create(config, mesh, 150, "")
    ours = random_variables(model)
    other = jax.tree.map(lambda x: x + 1, ours)

    def found(variables, classes=None):
        return Weights(variables, None, "W", {}, classes=classes)

    adopted = made.adopt(ours, found(other, made.classes), True)
    jax.tree.map(np.testing.assert_array_equal, adopted, other)
    renamed = ("something else", *made.classes[1:])
    with pytest.raises(UserError, match="label 0 is 'something else', that of the data 'wall'"):
        made.adopt(ours, found(other, renamed), True)
    adopted = made.adopt(ours, found(other, renamed), False)["params"]["decode_head"]
    for module, expected in (("conv_seg", ours), ("bottleneck", other)):
        expected = expected["params"]["decode_head"][module]
        jax.tree.map(np.testing.assert_array_equal, adopted[module], expected)

    classifier = random_variables(stvit_jax.create_model("stvit_tiny", **NARROW_SETTINGS))
    with pytest.raises(UserError, match="is of a network for classification"):
        made.adopt(ours, found(classifier), True)
    capsys.readouterr()
    adopted = made.adopt(ours, found(classifier), False)
    assert "proj, norm, head" in capsys.readouterr().out
    stages = adopted["params"]["backbone"]["layers_0"]
    jax.tree.map(np.testing.assert_array_equal, stages, classifier["params"]["layers_0"])
    fewer = random_variables(network(num_classes=K))
    with pytest.raises(UserError, match="for other classes than the 150"):
        made.adopt(ours, found(fewer), True)
