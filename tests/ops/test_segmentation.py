"""The loss and the measures of pixels' classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvit_jax.ops import enlarged, resize, segmentation

EPSILON = float(np.finfo(np.float32).eps)  # what mmsegmentation adds to every divisor


def test_scores_are_mmsegmentations(data_dir):
    golden = np.load(data_dir / "segmentation_heads.npz")
    count = jax.jit(segmentation.confusion, static_argnums=2)
    total = sum(
        np.asarray(count(golden[f"miou/pred{i}"], golden[f"miou/gt{i}"], 9)) for i in (0, 1)
    )
    np.testing.assert_array_equal(np.diag(total), golden["miou/intersect"])
    union = total.sum(0)[:-1] + total.sum(1) - np.diag(total)
    np.testing.assert_array_equal(union, golden["miou/union"])
    assert total.sum() == sum(np.sum(golden[f"miou/gt{i}"] != 255) for i in (0, 1))
    ours = segmentation.scores(total)
    expected = dict(
        zip(("aacc", "miou", "macc"), golden["miou/summary_aAcc_mIoU_mAcc"], strict=True)
    )
    assert ours == pytest.approx(expected, rel=1e-6)  # theirs are float32


def test_counts_are_exact_and_of_every_pair():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 5, (2, 3, 50, 40))
    labels = np.where(rng.uniform(size=labels.shape) < 0.2, 255, labels)
    counts = segmentation.confusion(jnp.asarray(predicted), jnp.asarray(labels, jnp.uint8), 5)
    expected = [[np.sum((labels == i) & (predicted == j)) for j in range(6)] for i in range(5)]
    np.testing.assert_array_equal(counts, expected)


def test_nothing_to_divide_by_is_no_number():
    scores = segmentation.scores(np.zeros((3, 4), int))
    assert all(np.isnan(value) for value in scores.values())
    one = segmentation.scores(np.diag([5, 0, 0, 0])[:3])
    assert one == {"miou": 1, "aacc": 1, "macc": 1}


@pytest.mark.usefixtures("x64")
def test_cross_entropy_and_what_is_ignored():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 4, 6))
    labels = rng.integers(0, 6, (2, 3, 4)).astype(np.uint8)
    labels[0, 0], labels[1, 2, 3] = 255, 255
    kept = labels != 255
    log = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    each = -np.take_along_axis(log, np.where(kept, labels, 0)[..., None], axis=-1)[..., 0]
    for mean_of_labelled, pixels in ((False, labels.size), (True, kept.sum())):
        loss = segmentation.cross_entropy(logits, labels, mean_of_labelled=mean_of_labelled)
        np.testing.assert_allclose(loss, each[kept].sum() / (pixels + EPSILON), rtol=1e-12)
    gradient = jax.grad(segmentation.cross_entropy)(jnp.asarray(logits), labels)
    assert np.all(gradient[~kept] == 0) and np.all(gradient[kept] != 0)
    right = np.sum(np.argmax(logits, -1)[kept] == labels[kept]) / (kept.sum() + EPSILON)
    np.testing.assert_allclose(segmentation.accuracy(logits, labels), right, rtol=1e-12)
    nothing = np.full_like(labels, 255)
    assert segmentation.cross_entropy(logits, nothing, mean_of_labelled=True) == 0
    narrow = segmentation.cross_entropy(jnp.asarray(logits, jnp.bfloat16), labels)
    assert narrow.dtype == jnp.float32


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "size, ratios", [((5, 4), (4, 4)), ((3, 2), (2, 16)), ((1, 3), (4, 3)), ((4, 4), (1, 1))]
)
def test_logits_of_any_size_are_enlarged(size, ratios):
    """In squares or not: loss, gradient and accuracy are those of the enlarged logits."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(300 * rng.normal(size=(2, *size, 6)))  # more than exp can take
    whole = tuple(n * ratio for n, ratio in zip(size, ratios, strict=True))
    labels = rng.integers(0, 6, (2, *whole)).astype(np.uint8)
    labels[:, 0], labels[1, :, -1] = 255, 255
    assert enlarged.takes(logits, labels) == (ratios[1] % 2 == 0)

    def plain(logits):
        logits = resize.bilinear(logits, whole)
        log = jax.nn.log_softmax(logits)
        each = jnp.take_along_axis(log, np.where(labels == 255, 0, labels)[..., None], -1)[..., 0]
        right = jnp.argmax(logits, -1) == labels
        loss = -jnp.sum(jnp.where(labels == 255, 0, each)) / (labels.size + EPSILON)
        return loss, right[labels != 255].sum() / (np.sum(labels != 255) + EPSILON)

    def ours(logits):
        return segmentation.cross_entropy(logits, labels), segmentation.accuracy(logits, labels)

    expected = jax.value_and_grad(plain, has_aux=True)(logits)
    found = jax.jit(jax.value_and_grad(ours, has_aux=True))(logits)
    (loss, accuracy), gradient = jax.tree.map(np.asarray, expected)
    assert np.abs(gradient).max() > 1e-3
    np.testing.assert_allclose(found[0][0], loss, rtol=1e-12)
    np.testing.assert_allclose(found[0][1], accuracy, rtol=1e-12)
    np.testing.assert_allclose(found[1], gradient, rtol=0, atol=1e-12)
