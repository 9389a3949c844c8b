"""RandAugment: every op against Pillow's, the batch against single ops, and the draws."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from stvit_jax.augment import affine, blends, tables
from stvit_jax.augment import rand_augment as ra
from stvit_jax.errors import UserError

DATA = Path(__file__).parents[1] / "golden"
ENTRIES = json.loads((DATA / "randaugment.json").read_text())
PIXELS = np.load(DATA / "randaugment.npz")

BLENDS = {
    "ColorIncreasing": ImageEnhance.Color,
    "ContrastIncreasing": ImageEnhance.Contrast,
    "BrightnessIncreasing": ImageEnhance.Brightness,
    "SharpnessIncreasing": ImageEnhance.Sharpness,
}
EXACT = {"Equalize", "Invert", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd", *BLENDS}
NEARLY = {"AutoContrast"}
GEOMETRIC = {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}
DRAWS = {"magnitude": 9.0, "magnitude_std": 0.5, "num_ops": 2, "prob": 0.5}


rand_augment = jax.jit(ra.rand_augment)
apply_draws = jax.jit(ra.apply_draws)
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


def reference_factor(magnitude: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """timm's, in double."""
    return np.maximum(0.1, 1.0 + sign * (np.asarray(magnitude, np.float64) / 10 * 0.9))


def draws_of(op: str, magnitude: np.ndarray, sign: np.ndarray) -> ra.Draws:
    """One round of `op`."""
    one_round = (jnp.asarray(x, jnp.float32)[:, None] for x in (magnitude, sign))
    magnitude, sign = one_round
    return ra.Draws(
        jnp.full(magnitude.shape, ra.OPS.index(op), jnp.int32),
        magnitude,
        sign,
        blends.factor_of(magnitude, sign),
    )


def signed(magnitudes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.tile(magnitudes, 2), np.repeat([-1.0, 1.0], len(magnitudes))


def test_blend_factors_are_those_of_doubles() -> None:
    generator = np.random.default_rng(0)
    drawn = generator.normal(9, 0.5, 300_000).clip(0, 10)
    anything = generator.uniform(1 / 8, 10, 300_000)
    # 1 + 0.09 m is halfway between two floats where m is an odd multiple of this, in 2..4.
    ties = 25 * 2.0**-22 * np.arange(400_001, 420_001, 2)
    magnitude, sign = signed(np.float32([*drawn, *anything, *ties, *ties / 2]))
    result = np.asarray(jax.jit(blends.factor_of)(magnitude, np.float32(sign)))
    np.testing.assert_array_equal(result, np.float32(reference_factor(magnitude, sign)))

    magnitude, sign = signed(np.float32([0, 2.0**-40, *generator.uniform(0, 1 / 8, 100_000)]))
    result = np.asarray(jax.jit(blends.factor_of)(magnitude, np.float32(sign)))
    expected = np.float32(reference_factor(magnitude, sign))
    assert np.abs(result - expected).max() <= 2.0**-23
    assert np.mean(result != expected) < 0.01


@pytest.mark.parametrize("op", BLENDS)
def test_blends_equal_pillow_at_every_magnitude(op: str) -> None:
    """Where a pixel lands on an integer, one unit of float32 in the factor would be a level."""
    generator = np.random.default_rng(0)
    magnitudes = np.float32([*np.linspace(0, 10, 401), *generator.normal(9, 0.5, 99).clip(0, 10)])
    magnitude, sign = signed(magnitudes)
    images = generator.integers(0, 256, (len(magnitude), 32, 32, 3), np.uint8)
    results = np.asarray(apply_draws(images, draws_of(op, magnitude, sign)))
    factors = reference_factor(magnitude, sign).tolist()
    expected = [
        BLENDS[op](Image.fromarray(image)).enhance(factor)
        for image, factor in zip(images, factors, strict=True)
    ]
    np.testing.assert_array_equal(results, np.stack(expected))


@pytest.mark.parametrize("op", BLENDS)
def test_blends_of_single_images_take_magnitudes_in_double(op: str) -> None:
    """Magnitudes that float32 does not have, with factors such as 1.1, 1.3, 0.7."""
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    for magnitude in (*np.arange(1, 10) / 0.9, 0.1, 4.7, 9.3):
        for negate in (False, True):
            factor = float(reference_factor(magnitude, -1 if negate else 1))
            expected = BLENDS[op](Image.fromarray(image)).enhance(factor)
            np.testing.assert_array_equal(ra.apply_op(image, op, magnitude, negate), expected)


def test_tables_are_looked_up_alike_with_and_without_gather() -> None:
    rng = np.random.default_rng(0)
    levels = jnp.asarray(rng.integers(0, 256, (3, 17, 5)), jnp.uint32)
    table = jnp.asarray(rng.integers(0, 256, (3, 256)), jnp.uint32)
    expected = np.stack([np.asarray(table)[i][np.asarray(levels)[i]] for i in range(3)])
    for look_up in (blends.look_up, blends.look_up_without_gather):
        np.testing.assert_array_equal(look_up(levels, table), expected)


@pytest.mark.parametrize("height, width", [(70, 45), (32, 32)])
def test_pixels_are_found_alike_with_and_without_gather(height: int, width: int) -> None:
    """Every geometric op at both ends of its magnitudes, from pixels that touch the image."""
    packed = jnp.asarray(
        np.random.default_rng(0).integers(0, 2**24, (1, height, width)), jnp.uint32
    )
    one = jnp.ones(1)
    for op in sorted(GEOMETRIC):
        for magnitude in (-10.0, -4.7, 10.0):
            a, b, c, d, e, f = affine.coefficients(
                jnp.array([ra.OPS.index(op)]), magnitude * one, height, width
            )[0]
            y, x = np.mgrid[:height, :width] + 0.5
            column, row = a * x + b * y + c, d * x + e * y + f
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            starts = [jnp.floor(z - 0.5).astype(jnp.int32)[None] - 1 for z in (row, column)]
            expected = affine.windows(packed, *starts)
            found = affine.windows_without_gather(packed, *starts)
            np.testing.assert_array_equal((found - expected) * inside, 0)


def test_the_mean_of_a_large_image_does_not_overflow() -> None:
    """Contrast blends with it: the sum of 2**24 bright pixels is just below 2**32."""
    draws = draws_of("ContrastIncreasing", np.float32([9]), np.float32([-1]))
    fields = (draws.op[0], draws.magnitude[0], draws.factor[0])
    of_many, of_few = (
        jax.jit(tables.op_tables)(jnp.full((1, *size), 0xFAFAFA, jnp.uint32), *fields)
        for size in ((2**12, 2**12), (8, 8))
    )
    np.testing.assert_array_equal(of_many, of_few)
    assert of_few[0, 0, 250] == 250


def test_solarize_add_adds_what_doubles_say() -> None:
    """Around the magnitudes where the sum changes: 11 m must not be rounded up to an integer."""
    steps = np.float32(np.arange(1, 110) / 11)
    magnitudes = np.stack([steps, np.nextafter(steps, np.float32(0)), np.nextafter(steps, 11)])
    magnitudes = np.float32(magnitudes).ravel()
    draws = draws_of("SolarizeAdd", magnitudes, np.ones_like(magnitudes))
    results = apply_draws(np.zeros((len(magnitudes), 1, 1, 3), np.uint8), draws)
    expected = (magnitudes.astype(np.float64) / 10 * 110).astype(int)
    np.testing.assert_array_equal(results[:, 0, 0, 0], expected)


def test_ops_are_those_of_the_golden_file() -> None:
    assert set(ra.OPS) == {entry["op"] for entry in ENTRIES} == EXACT | NEARLY | GEOMETRIC
    assert len(ra.OPS) == 15


def test_unknown_op_is_a_user_error() -> None:
    for op in ("Blur", None, np.array(["Invert"])):
        with pytest.raises(UserError, match="unknown RandAugment op .*AutoContrast"):
            ra.apply_op(photo(0), op, 9.0, False)


@pytest.mark.parametrize(
    ("image", "magnitude", "message"),
    [
        (photo(0) / 255, 9.0, "float64 (64, 64, 3); apply_op takes uint8 (H, W, 3)"),
        (photo(0).tolist(), 9.0, "of type list"),
        (photo(0)[None], 9.0, "uint8 (1, 64, 64, 3)"),
        (photo(0).transpose(2, 0, 1), 9.0, "uint8 (3, 64, 64)"),
        (photo(0)[:, :0], 9.0, "uint8 (64, 0, 3)"),
        (photo(0), 10.5, "the magnitude is 10.5; it must be a number in 0..10"),
        (photo(0), -1, "the magnitude is -1"),
        (photo(0), float("nan"), "the magnitude is nan"),
        (photo(0), "9", "the magnitude is '9'"),
        (photo(0), None, "the magnitude is None"),
        (photo(0), np.ones(2), "the magnitude is array([1., 1.])"),
    ],
)
def test_what_is_no_image_or_magnitude_is_named(image, magnitude, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        ra.apply_op(image, "Invert", magnitude, False)


@pytest.mark.parametrize(
    "magnitude", [9, np.float32(9), np.int64(9), np.array(9.0), jnp.float32(9)]
)
def test_magnitudes_are_any_library_s_numbers(magnitude) -> None:
    np.testing.assert_array_equal(
        ra.apply_op(jnp.asarray(photo(0)), "ColorIncreasing", magnitude, np.True_),
        ra.apply_op(photo(0), "ColorIncreasing", 9.0, True),
    )


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
    for image, ops, magnitudes, signs, _ in zip(images, *draws, strict=True):
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
