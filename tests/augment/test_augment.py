"""Normalisation, random erasing, mixup and CutMix against slow loops; the whole on 8 devices."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch

from benchmarks.hlo import collectives
from stvit_jax import augment
from stvit_jax.augment import erasing, mix, rand_augment
from stvit_jax.data import normalization
from stvit_jax.errors import UserError

MANY = 20_000

random_erasing = jax.jit(erasing.random_erasing)
draw_erasing = jax.jit(erasing.draw_erasing, static_argnums=(1, 2, 3))
draw_mix = jax.jit(mix.draw_mix, static_argnums=(1, 2, 3))
mixup_cutmix = jax.jit(mix.mixup_cutmix, static_argnames="group_size")


def images_and_labels(batch: int, height: int = 16, width: int = 20) -> tuple:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (batch, height, width, 3), np.uint8)
    return images, generator.integers(0, 7, batch, np.int32)


def near(values: np.ndarray, mean: float, deviation: float) -> bool:
    """Whether the mean of independent `values` is within five standard errors of `mean`."""
    return abs(np.mean(values) - mean) <= 5 * deviation / np.sqrt(np.size(values))


def assert_same_distribution(one: np.ndarray, other: np.ndarray) -> None:
    """Two-sample Kolmogorov-Smirnov, at a level of about one in a million."""
    statistic = scipy.stats.ks_2samp(one, other, method="asymp").statistic
    assert statistic <= 2.7 * np.sqrt(1 / len(one) + 1 / len(other)), statistic


# Normalisation and labels


def test_normalize_is_the_formula_for_numpy_and_jax() -> None:
    images, _ = images_and_labels(2)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for kind in (np.asarray, jnp.asarray):
        result = normalization.normalize(kind(images))
        assert result.dtype == np.float32 and isinstance(result, type(kind(images)))
        np.testing.assert_allclose(result, (images / 255 - mean) / std, rtol=0, atol=1e-6)


def test_whole_numbers_are_pixels_whatever_their_width() -> None:
    images, _ = images_and_labels(2)
    for dtype in (np.int32, np.int64, np.uint16):
        result = normalization.normalize(images.astype(dtype))
        np.testing.assert_array_equal(result, normalization.normalize(images))
    shapes = jax.eval_shape(normalization.normalize, images)
    assert (shapes.shape, shapes.dtype) == (images.shape, jnp.float32)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "images are float32 (2, 8, 8, 3)"),
        (jnp.zeros((2, 8, 8, 3), jnp.bfloat16), "images are bfloat16 (2, 8, 8, 3)"),
        (np.zeros((2, 8, 8, 3), bool), "images are bool (2, 8, 8, 3)"),
        (np.zeros((2, 3, 8, 8), np.uint8), "images are uint8 (2, 3, 8, 8)"),
        (np.zeros((2, 8, 8), np.uint8), "images are uint8 (2, 8, 8)"),
        (np.uint8(3), "images are uint8 ()"),
        ([[[0, 0, 0]]], "images are of type list"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "images are a torch.Tensor"),
    ],
)
def test_normalize_refuses_what_are_no_pixels(images, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"{message}; normalize takes pixels in 0..255")):
        normalization.normalize(images)


def test_smooth_one_hot() -> None:
    result = mix.smooth_one_hot(jnp.array([2, 0]), 4, 0.1)
    off, on = 0.1 / 4, 1 - 0.1 + 0.1 / 4
    expected = [[off, off, on, off], [on, off, off, off]]
    np.testing.assert_allclose(result, expected, rtol=1e-6)


# Random erasing


def erasing_loop(generator: np.random.Generator, height: int, width: int) -> tuple | None:
    """The recipe's words: top, left, height, width of the box, or None."""
    for _ in range(10):
        area = generator.uniform(0.02, 1 / 3) * height * width
        ratio = np.exp(generator.uniform(np.log(0.3), -np.log(0.3)))
        h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if h < height and w < width:
            top = generator.integers(0, height - h, endpoint=True)
            return top, generator.integers(0, width - w, endpoint=True), h, w
    return None


def test_erasing_boxes_are_those_of_a_loop() -> None:
    """On an image so flat that a large part of the tries fails."""
    height, width = 20, 64
    boxes = draw_erasing(jax.random.key(0), MANY, height, width, probability=1.0)
    top, left, bottom, right = (np.asarray(edge) for edge in boxes)
    generator = np.random.default_rng(0)
    expected = np.array([erasing_loop(generator, height, width) for _ in range(MANY)])
    results = (top, left, bottom - top, right - left)
    for result, name in zip((*results, results[2] * results[3]), range(5), strict=True):
        column = expected[:, name] if name < 4 else expected[:, 2] * expected[:, 3]
        assert_same_distribution(result, column)
        assert {result.min(), result.max()} == {column.min(), column.max()}
    assert top.min() == left.min() == 0 and bottom.max() == height and right.max() == width
    assert results[2].max() < height and results[3].max() < width


def test_erasing_ranges_on_a_large_image() -> None:
    size = 2048
    boxes = draw_erasing(jax.random.key(1), MANY, size, size, probability=1.0)
    top, left, bottom, right = (np.asarray(edge, float) for edge in boxes)
    area = (bottom - top) * (right - left) / size**2
    aspect = np.log((bottom - top) / (right - left))
    # All tries fit but the most oblong large ones, so the marginals are as drawn, nearly.
    assert 0.0199 < area.min() < 0.0203 and 0.32 < area.max() < 0.334
    assert -np.log(0.299) > aspect.max() > 1.19 and np.log(0.299) < aspect.min() < -1.19
    assert near(aspect, 0, 2 * np.log(1 / 0.3) / np.sqrt(12))
    down, across = top / (size - bottom + top), left / (size - right + left)
    assert near(down, 0.5, 1 / np.sqrt(12)) and near(across, 0.5, 1 / np.sqrt(12))
    assert abs(np.corrcoef(down, across)[0, 1]) <= 5 / np.sqrt(MANY)


def test_erasing_rate_and_noise() -> None:
    images, key = jnp.full((2000, 12, 10, 3), 9.0), jax.random.key(2)
    result = np.asarray(random_erasing(key, images, probability=0.25))
    changed = (result != 9).any(-1)
    assert near(changed.any((1, 2)), 0.25, np.sqrt(0.25 * 0.75))
    noise = result[changed]  # (pixels, 3)
    assert near(noise, 0, 1) and near(noise**2, 1, np.sqrt(2))
    assert near(noise[:, 0] * noise[:, 1], 0, 1) and near(noise[1:] * noise[:-1], 0, 1)
    assert scipy.stats.kstest(noise.ravel(), "norm").statistic <= 2.7 / np.sqrt(noise.size)
    for sample in changed:  # one full box
        rows, columns = sample.any(1).nonzero()[0], sample.any(0).nonzero()[0]
        if len(rows):
            assert sample[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            assert sample.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)

    np.testing.assert_array_equal(random_erasing(key, images, probability=0.0), images)
    assert (np.asarray(random_erasing(key, images, probability=1.0)) != 9).any((1, 2, 3)).all()


def test_no_box_fits_one_row() -> None:
    boxes = draw_erasing(jax.random.key(0), 64, 1, 64, probability=1.0)
    assert not boxes.contains(1, 64).any()


# Mixup and CutMix


@pytest.mark.parametrize("group_size", [6, 0])
def test_mixing_is_that_of_a_loop(group_size: int) -> None:
    key, batch = jax.random.key(5), 72
    size = group_size or batch
    groups = batch // size
    images, labels = images_and_labels(batch)
    images = np.asarray(normalization.normalize(images))
    targets = np.asarray(mix.smooth_one_hot(labels, 7, 0.1))
    mixed, soft = mixup_cutmix(key, images, targets, group_size=group_size)
    draws = jax.device_get(draw_mix(key, groups, *images.shape[1:3]))
    assert groups == 1 or 2 <= draws.cutmix.sum() <= groups - 2

    expected, expected_soft = images.copy(), targets.copy()
    for group in range(groups):
        own = draws.weight[group]
        top, left, bottom, right = (edge[group] for edge in draws.box)
        if draws.cutmix[group]:
            own = 1 - (bottom - top) * (right - left) / (images.shape[1] * images.shape[2])
        for member in range(size):
            one, other = group * size + member, group * size + size - 1 - member
            if draws.cutmix[group]:
                box = np.s_[top:bottom, left:right]
                expected[one][box] = images[other][box]
            else:
                expected[one] = own * images[one] + (1 - own) * images[other]
            expected_soft[one] = own * targets[one] + (1 - own) * targets[other]
    np.testing.assert_allclose(mixed, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(soft, expected_soft, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.sum(soft, axis=1), 1, rtol=1e-6)
    cut = np.repeat(draws.cutmix, size)  # pasting keeps the bits
    np.testing.assert_array_equal(np.asarray(mixed)[cut], expected[cut])


def cutmix_loop(generator: np.random.Generator, height: int, width: int) -> tuple:
    """The recipe's words: top, left, bottom, right."""
    side = np.sqrt(1 - generator.beta(1, 1))
    h, w = int(height * side), int(width * side)
    y, x = generator.integers(0, height), generator.integers(0, width)
    return (
        *(max(0, y - h // 2), max(0, x - w // 2)),
        *(min(height, y + h // 2), min(width, x + w // 2)),
    )


def test_distribution_of_lambdas_and_cutmix_boxes() -> None:
    height, width = 33, 48
    draws = jax.device_get(draw_mix(jax.random.key(4), 2 * MANY, height, width))
    assert near(draws.cutmix, 0.5, 0.5)
    for chosen, alpha in ((draws.cutmix, 1.0), (~draws.cutmix, 0.8)):
        weight = draws.weight[chosen]
        test = scipy.stats.kstest(weight, scipy.stats.beta(alpha, alpha).cdf)
        assert test.statistic <= 2.7 / np.sqrt(len(weight))
        assert near(weight, 0.5, np.sqrt(1 / (8 * alpha + 4)))
        # The other alpha would be seen: the variances differ by 13 %, the standard error is 1 %.
        assert abs(np.var(weight) * (8 * alpha + 4) - 1) <= 0.05

    boxes = np.stack(draws.box, axis=1)[draws.cutmix]
    generator = np.random.default_rng(0)
    expected = np.array([cutmix_loop(generator, height, width) for _ in range(len(boxes))])
    assert boxes.min() == 0 and boxes[:, 2].max() == height and boxes[:, 3].max() == width
    for edges in (*np.eye(4), (-1, 0, 1, 0), (0, -1, 0, 1), (1, 0, 1, 0), (0, 1, 0, 1)):
        assert_same_distribution(boxes @ edges, expected @ edges)
    areas = [(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (boxes, expected)]
    assert_same_distribution(*areas)


def test_draws_of_groups_and_steps_differ() -> None:
    one, other = (
        jax.device_get(draw_mix(jax.random.key(seed), 2 * MANY, 33, 48)) for seed in (0, 1)
    )
    assert len(np.unique(one.weight)) > 1.9 * MANY  # of float32 with 23 random bits
    assert not np.array_equal(one.cutmix, other.cutmix)
    for field in (one.weight, *one.box):
        assert abs(np.corrcoef(field[1:], field[:-1])[0, 1]) <= 5 / np.sqrt(2 * MANY)


# The whole


def test_everything_off_is_normalisation_and_smoothing() -> None:
    images, labels = images_and_labels(4)
    result, targets = augment.augment_batch(
        jax.random.key(0),
        images,
        labels,
        num_classes=7,
        randaugment=False,
        erasing_probability=0.0,
        mixup=False,
    )
    np.testing.assert_array_equal(result, normalization.normalize(images))
    np.testing.assert_array_equal(targets, mix.smooth_one_hot(labels, 7, 0.1))


def test_no_key_is_drawn_from_twice() -> None:
    run = jax.jit(functools.partial(augment.augment_batch, num_classes=7, group_size=2))
    with jax.debug_key_reuse(True):
        run(jax.random.key(0), *images_and_labels(4))
        with pytest.raises(jax.errors.KeyReuseError):
            jax.jit(lambda key: jax.random.uniform(key) + jax.random.normal(key))(jax.random.key(0))


def test_float64_mode_keeps_float32(x64: None) -> None:
    shapes = jax.eval_shape(
        functools.partial(augment.augment_batch, num_classes=7),
        jax.random.key(0),
        *images_and_labels(4),
    )
    assert [shape.dtype for shape in shapes] == [jnp.float32, jnp.float32]


def test_the_whole_is_its_parts_in_order_on_any_number_of_devices() -> None:
    """In a process with eight devices, which jax has to know at its start."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "tests.augment.test_augment"], cwd=root, env=environment, check=True
    )


def compare_eight_devices_with_one() -> None:
    batch, group = 64, 8
    images, labels = images_and_labels(batch)
    key = jax.random.key(0)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 8
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    run = functools.partial(augment.augment_batch, num_classes=7, group_size=group)

    def compiled_with(**changes):
        function = functools.partial(run, **({"mesh": mesh} | changes))
        jitted = jax.jit(function, in_shardings=(None, sharding, sharding))
        return jitted.lower(key, images, labels).compile()

    compiled = compiled_with()
    assert not collectives(compiled.as_text())
    # Without the mesh, a chunk holds samples of all devices; in the whole batch, partners are far.
    assert collectives(compiled_with(mesh=None, mixup=False).as_text())
    assert collectives(compiled_with(group_size=0, randaugment=False).as_text())
    result = compiled(key, *jax.device_put((images, labels), sharding))
    assert result[0].sharding.is_equivalent_to(sharding, 4)

    keys = jax.random.split(key, 3)
    parts = normalization.normalize(jax.jit(rand_augment.rand_augment)(keys[0], images))
    parts = random_erasing(keys[1], parts)
    targets = mix.smooth_one_hot(labels, 7, 0.1)
    parts = mixup_cutmix(keys[2], parts, targets, group_size=group)
    for on_eight, on_one in zip(result, parts, strict=True):  # a level of uint8 is 0.017
        np.testing.assert_allclose(on_eight, on_one, rtol=0, atol=1e-6)


if __name__ == "__main__":
    compare_eight_devices_with_one()
