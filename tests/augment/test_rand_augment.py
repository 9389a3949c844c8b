"""RandAugment: every op against Pillow's, the batch against single ops, and the draws."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvit_jax.augment import affine
from stvit_jax.augment import rand_augment as ra
from stvit_jax.errors import UserError

DATA = Path(__file__).parents[1] / "golden"
ENTRIES = json.loads((DATA / "randaugment.json").read_text())
PIXELS = np.load(DATA / "randaugment.npz")

EXACT = {"Equalize", "Invert", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd"}
NEARLY = {
    "AutoContrast",
    "ColorIncreasing",
    "ContrastIncreasing",
    "BrightnessIncreasing",
    "SharpnessIncreasing",
}
GEOMETRIC = {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}
DRAWS = {"magnitude": 9.0, "magnitude_std": 0.5, "num_ops": 2, "prob": 0.5}


rand_augment = jax.jit(ra.rand_augment)
draw = jax.jit(ra.draw, static_argnums=1, static_argnames="num_ops")


def photo(index: int) -> np.ndarray:
    return PIXELS[f"image{index}"]


def photos(batch: int) -> np.ndarray:
    """Different images of the size of the first photo: it, shifted and with its colours swapped."""
    generator = np.random.default_rng(0)
    return np.stack(
        [
            np.roll(photo(0), generator.integers(0, 64, 2), (0, 1))[..., generator.permutation(3)]
            for _ in range(batch)
        ]
    )


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["key"])
def test_op_equals_pillow(entry: dict) -> None:
    expected = PIXELS[entry["key"]].astype(int)
    image = PIXELS[entry["key"].split("/")[0]]
    result = ra.apply_op(image, entry["op"], entry["level"], entry["negated"])
    assert result.dtype == jnp.uint8 and result.shape == image.shape
    result = np.asarray(result).astype(int)
    difference = np.abs(result - expected)
    if entry["op"] in EXACT:
        assert difference.max() == 0
    elif entry["op"] in NEARLY:
        assert difference.max() <= 1
        assert np.mean(difference > 0) <= 0.01
    else:
        assert entry["op"] in GEOMETRIC
        assert difference.mean() <= 0.02
        assert np.mean(difference <= 1) >= 0.9999
        filled = (expected == affine.FILL).all(-1)
        assert filled.any()
        np.testing.assert_array_equal((result == affine.FILL).all(-1), filled)


def test_ops_are_those_of_the_golden_file() -> None:
    assert set(ra.OPS) == {entry["op"] for entry in ENTRIES} == EXACT | NEARLY | GEOMETRIC
    assert len(ra.OPS) == 15


def test_unknown_op_is_a_user_error() -> None:
    with pytest.raises(UserError, match="'Blur'.*AutoContrast"):
        ra.apply_op(photo(0), "Blur", 9.0, False)


@pytest.mark.parametrize("op", sorted(GEOMETRIC | NEARLY - {"AutoContrast"}))
def test_magnitude_zero_changes_nothing(op: str) -> None:
    np.testing.assert_array_equal(ra.apply_op(photo(1), op, 0.0, True), photo(1))


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("PosterizeIncreasing", lambda image: 0 * image),  # 0 bits
        ("SolarizeIncreasing", lambda image: 255 - image),  # threshold 0
        ("SolarizeAdd", lambda image: np.where(image < 128, np.minimum(image + 110, 255), image)),
    ],
)
def test_the_largest_magnitude(op: str, expected) -> None:
    result = ra.apply_op(photo(0), op, 10.0, False)
    np.testing.assert_array_equal(result, expected(photo(0).astype(int)))


@pytest.mark.parametrize("op", ["AutoContrast", "Equalize"])
def test_an_image_of_one_level_stays(op: str) -> None:
    image = np.broadcast_to(np.uint8([0, 77, 255]), (64, 64, 3))
    np.testing.assert_array_equal(ra.apply_op(image, op, 9.0, False), image)


def test_autocontrast_is_within_a_level_of_doubles() -> None:
    """For images that hold every level of their range, whatever the range."""
    generator = np.random.default_rng(0)
    wrong = levels = 0
    for low, high in np.sort(generator.integers(0, 256, (60, 2))):
        if low == high:
            continue
        values = np.clip(np.arange(64 * 64) % 256, low, high)
        scale = 255 / (high - low)
        expected = np.clip((values * scale - low * scale).astype(int), 0, 255)
        image = np.broadcast_to(values.reshape(64, 64, 1), (64, 64, 3)).astype(np.uint8)
        result = np.asarray(ra.apply_op(image, "AutoContrast", 9.0, False)).astype(int)
        difference = np.abs(result[..., 0].ravel() - expected)
        assert difference.max() <= 1
        np.testing.assert_array_equal(difference[values == high], 0)
        wrong, levels = wrong + (difference > 0).sum(), levels + difference.size
    assert wrong <= 0.005 * levels


def one_by_one(images: np.ndarray, draws: ra.Draws) -> np.ndarray:
    """The meaning of `apply_draws`: op after op, image after image."""
    result = []
    for image, ops, magnitudes, signs in zip(images, *draws, strict=True):
        for op, magnitude, sign in zip(ops, magnitudes, signs, strict=True):
            if op != ra.NO_OP:
                image = np.asarray(ra.apply_op(image, ra.OPS[op], magnitude, sign < 0))
        result.append(image)
    return np.stack(result)


@pytest.mark.parametrize("prob", [0.0, 0.5, 1.0])
def test_a_batch_equals_one_by_one(prob: float) -> None:
    images, key = photos(4 * ra._CHUNK - 5), jax.random.key(3)
    draws = jax.device_get(draw(key, len(images), **(DRAWS | {"prob": prob})))
    result = rand_augment(key, images, prob=prob)
    assert result.dtype == jnp.uint8
    np.testing.assert_array_equal(result, one_by_one(images, draws))
    if prob == 0:
        np.testing.assert_array_equal(result, images)
    if prob == 1:  # every op, and affine ops in more than one chunk of samples
        assert set(draws.op.ravel()) == set(range(15))
        affine = np.isin(draws.op, [ra.OPS.index(op) for op in GEOMETRIC])
        assert affine.sum(axis=0).max() > ra._CHUNK


def near(values: np.ndarray, mean: float, deviation: float) -> bool:
    """Whether the mean of independent `values` is within five standard errors of `mean`."""
    return abs(np.mean(values) - mean) <= 5 * deviation / np.sqrt(np.size(values))


def near_rate(hits: np.ndarray, rate: float) -> bool:
    return near(hits, rate, np.sqrt(rate * (1 - rate)))


@pytest.fixture(scope="module")
def drawn() -> ra.Draws:
    always = draw(jax.random.key(1), 100_000, **(DRAWS | {"prob": 1.0}))
    return jax.device_get(always)


def test_ops_are_uniform_and_independent(drawn: ra.Draws) -> None:
    for index in range(15):
        assert near_rate(drawn.op == index, 1 / 15), ra.OPS[index]
    pairs = np.bincount(drawn.op[:, 0] * 15 + drawn.op[:, 1], minlength=225)
    expected = len(drawn.op) / 225
    chi_squared = ((pairs - expected) ** 2 / expected).sum()  # 224 degrees of freedom
    assert abs(chi_squared - 224) <= 5 * np.sqrt(2 * 224)


def test_ops_apply_at_the_stated_rate(drawn: ra.Draws) -> None:
    half = jax.device_get(draw(jax.random.key(1), 100_000, **DRAWS))
    applied = half.op != ra.NO_OP
    assert near_rate(applied, 0.5)
    assert near_rate(applied[:, 0] & applied[:, 1], 0.25)
    np.testing.assert_array_equal(half.op[applied], drawn.op[applied])
    assert near(half.op[applied], 7, np.sqrt((15**2 - 1) / 12))
    assert near(half.sign[applied], 0, 1)
    assert near(half.magnitude[applied] < 9, 0.5, 0.5)


def test_magnitudes_are_normal_and_clipped(drawn: ra.Draws) -> None:
    magnitude = drawn.magnitude
    assert magnitude.max() == 10 and magnitude.min() > 6
    assert near_rate(magnitude == 10, 0.02275)
    for deviations, rate in ((-2, 0.02275), (-1, 0.15866), (0, 0.5), (1, 0.84134)):
        assert near_rate(magnitude < 9 + 0.5 * deviations, rate)
    assert abs(np.corrcoef(magnitude.T)[0, 1]) <= 5 / np.sqrt(len(magnitude))
    low = draw(jax.random.key(2), 100_000, **(DRAWS | {"magnitude": 0.5}))
    assert low.magnitude.min() == 0
    assert near_rate(np.asarray(low.magnitude) == 0, 0.15866)


def test_signs_are_even_and_independent(drawn: ra.Draws) -> None:
    assert set(np.unique(drawn.sign)) == {-1, 1}
    assert near(drawn.sign, 0, 1)
    assert near(drawn.sign[:, 0] * drawn.sign[:, 1], 0, 1)
    assert near(drawn.sign * (drawn.op - 7), 0, np.sqrt((15**2 - 1) / 12))
    assert near(drawn.sign * (drawn.magnitude - drawn.magnitude.mean()), 0, 0.5)


def test_draws_depend_on_key_and_slot_alone() -> None:
    few, many, other = (
        jax.device_get(draw(jax.random.key(seed), batch, **DRAWS))
        for seed, batch in ((0, 5), (0, 100_000), (1, 5))
    )
    for field_of_few, field_of_many in zip(few, many, strict=True):
        np.testing.assert_array_equal(field_of_few, field_of_many[:5])
    assert not np.array_equal(few.magnitude, other.magnitude)
