"""The host's crops, against Pillow, the golden crops and the recipe's formulas."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from stvit_jax.data import decode
from stvit_jax.data.decode import eval_image, sample_crop, train_image
from stvit_jax.errors import UserError
from tests.data.images import difference, encode, photograph, pillow

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "eval_transform.npz")
BICUBIC = Image.Resampling.BICUBIC


@pytest.fixture(params=["fast", "pillow"])
def resizer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both resizers: the fast one, and Pillow as on platforms without it."""
    if request.param == "pillow":
        monkeypatch.setattr(decode, "fast", None)
    else:
        assert decode.fast is not None
    return request.param


@pytest.mark.parametrize("index", range(5))
def test_eval_image_is_the_golden_crop(index: int, resizer: str) -> None:
    crop = eval_image(GOLDEN[f"jpeg{index}"].tobytes(), 224)
    assert crop.shape == (224, 224, 3) and crop.dtype == np.uint8
    wrong = difference(crop, GOLDEN[f"crop{index}/224"]) > 1
    assert wrong.any(axis=-1).mean() <= 0.001


@pytest.mark.parametrize(
    ("image_size", "height", "width", "resized"),
    [
        (224, 301, 500, (256, 425)),  # offset 100.5, which rounds down
        (224, 300, 501, (256, 427)),  # offset 101.5, which rounds up
        (224, 501, 300, (427, 256)),  # 427.52, which is cut off
        (224, 100, 90, (284, 256)),
        (160, 375, 500, (182, 242)),
        (384, 375, 500, (384, 512)),
        (384, 700, 411, (654, 384)),
    ],
)
def test_eval_image_is_resize_and_centre_crop(
    image_size: int, height: int, width: int, resized: tuple[int, int]
) -> None:
    data = encode(photograph(0, height, width))
    left, top = (round((n - image_size) / 2) for n in resized[::-1])
    expected = pillow(data).resize(resized[::-1], BICUBIC)
    expected = expected.crop((left, top, left + image_size, top + image_size))
    wrong = difference(eval_image(data, image_size), expected)
    assert wrong.mean() <= 0.01 and wrong.max() <= 1


@pytest.mark.parametrize(
    ("data", "image_size", "words"),
    [
        ("dog.jpg", 224, "data is of type str: give the bytes"),
        (Path("dog.jpg"), 224, "data is of type PosixPath: give the bytes"),
        (np.zeros((8, 8, 3), np.uint8), 224, "data is of type ndarray: give the bytes"),
        (encode(np.zeros((8, 8, 3), np.uint8)), 0, "image_size is 0: give a positive"),
        (encode(np.zeros((8, 8, 3), np.uint8)), 32.0, r"image_size is 32\.0: give a positive"),
    ],
)
def test_eval_image_of_something_else(data: object, image_size: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        eval_image(data, image_size)


@pytest.mark.parametrize(
    ("image_size", "height", "width", "resized"),
    [
        (32, 8, 8, (32, 32)),
        (32, 20, 41, (32, 32)),  # larger and smaller
        (73, 32, 32, (83, 83)),
        (224, 100, 90, (284, 256)),
        (224, 200, 300, (256, 384)),
        (224, 500, 100, (1280, 256)),
        (384, 301, 222, (520, 384)),
    ],
)
def test_an_enlarged_eval_image_is_pillows(
    image_size: int, height: int, width: int, resized: tuple[int, int], resizer: str
) -> None:
    data = encode(photograph(0, height, width), "PNG")
    left, top = (round((n - image_size) / 2) for n in resized[::-1])
    expected = pillow(data).resize(resized[::-1], BICUBIC)
    expected = expected.crop((left, top, left + image_size, top + image_size))
    np.testing.assert_array_equal(eval_image(data, image_size), expected)


@pytest.mark.parametrize("shape", [(1, 100_000), (100_000, 1)])
def test_an_enlarged_line_takes_little_memory(shape: tuple[int, int]) -> None:
    data = encode(np.full((*shape, 3), 9, np.uint8), "PNG")
    tracemalloc.start()
    assert (eval_image(data, 224) == 9).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000  # bytes; enlarged, the line would have 20 GB


@pytest.mark.parametrize("vertical", [False, True])
def test_only_what_the_crop_needs_is_resized(vertical: bool) -> None:
    shape, size = (1, 2_000_000, 3), (256, 512_000_000)
    if vertical:
        shape, size = (2_000_000, 1, 3), size[::-1]
    line = np.broadcast_to(np.uint8(9), shape)  # takes one byte
    tracemalloc.start()
    crop = decode._resize_and_crop(line, size, 224)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (crop == 9).all()
    assert peak < 1_000_000  # bytes; the whole line has 6,000,000


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (150, 200), (1200, 900)])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_training_crop_is_pillows(height: int, width: int, subsampling: int, resizer: str) -> None:
    data = encode(photograph(height, height, width), quality=90, subsampling=subsampling)
    for seed in range(8):
        crop = train_image(data, 224, np.random.default_rng(seed), flip=False)
        top, left, rows, columns = sample_crop(height, width, np.random.default_rng(seed))
        expected = pillow(data).crop((left, top, left + columns, top + rows))
        expected = expected.resize((224, 224), BICUBIC)
        if resizer == "pillow":
            np.testing.assert_array_equal(crop, expected)
        assert difference(crop, expected).mean() <= 0.1


@pytest.mark.parametrize("height", [225, 277, 375, 376, 377, 480, 1000])
def test_passes_are_made_in_pillows_order(height: int) -> None:
    # With the passes swapped the difference is about 0.25.
    pixels = photograph(height, height, 300)
    expected = Image.fromarray(pixels).resize((224, 224), BICUBIC)
    crop = decode._resize_and_crop(pixels, (224, 224), 224)
    assert difference(crop, expected).mean() <= 0.02


@pytest.mark.parametrize("image_size", [32, 224])
def test_flip_mirrors_half_of_the_images(image_size: int) -> None:
    data = encode(photograph(1, 32, 32), "PNG")
    mirrored = []
    for seed in range(100):
        plain = train_image(data, image_size, np.random.default_rng(seed), flip=False)
        image = train_image(data, image_size, np.random.default_rng(seed), flip=True)
        assert image.flags.c_contiguous and image.flags.writeable
        mirrored.append((image == plain[:, ::-1]).all())
        assert mirrored[-1] or (image == plain).all()
    assert 35 <= sum(mirrored) <= 65


def test_training_crop_is_a_function_of_the_generator() -> None:
    data = encode(photograph(2, 90, 120))
    images = [train_image(data, 64, np.random.default_rng(seed), flip=True) for seed in (5, 5, 6)]
    np.testing.assert_array_equal(images[0], images[1])
    assert (images[0] != images[2]).any()
    rng, draws = np.random.default_rng(7), np.random.default_rng(7)
    train_image(data, 64, rng, flip=True)
    sample_crop(90, 120, draws)
    draws.random()
    assert rng.bit_generator.state == draws.bit_generator.state


def boxes(height: int, width: int, count: int, seed: int = 0) -> np.ndarray:
    """(count, 4): top, left, height, width."""
    rng = np.random.default_rng(seed)
    return np.array([sample_crop(height, width, rng) for _ in range(count)])


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 300), (2000, 2000)])
def test_area_and_aspect_of_boxes(height: int, width: int) -> None:
    rng = np.random.default_rng(1)
    area = rng.uniform(0.08, 1, 100_000) * height * width
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 100_000))
    columns, rows = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (columns <= width) & (rows <= height)

    drawn = boxes(height, width, 4000)
    assert (drawn[:, :2] >= 0).all()
    assert (drawn[:, :2] + drawn[:, 2:] <= (height, width)).all()
    for ours, formula in [
        (drawn[:, 2] * drawn[:, 3], (rows * columns)[fits]),
        (np.log(drawn[:, 3] / drawn[:, 2]), np.log(columns / rows)[fits]),
    ]:
        assert stats.ks_2samp(ours, formula).pvalue > 0.01
    assert 0.075 < (drawn[:, 2] * drawn[:, 3]).min() / (height * width) < 0.09


def test_offsets_of_boxes_are_uniform_and_inclusive() -> None:
    drawn = boxes(12, 12, 8000)
    for offset, length in [(drawn[:, 0], drawn[:, 2]), (drawn[:, 1], drawn[:, 3])]:
        for room in range(1, 8):
            counts = np.bincount(offset[length == 12 - room], minlength=room + 1)
            assert len(counts) == room + 1
            assert stats.chisquare(counts).pvalue > 0.001
    independent = drawn[(drawn[:, 2] == 8) & (drawn[:, 3] == 8)]
    assert len({(top, left) for top, left, _, _ in independent}) == 25


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (10, 1000, (0, 493, 10, 13)),  # clamped to 4/3
        (1000, 10, (493, 0, 13, 10)),  # clamped to 3/4
        (1, 1000, (0, 499, 1, 1)),
        (1, 1, (0, 0, 1, 1)),
    ],
)
def test_box_when_no_try_fits(height: int, width: int, box: tuple[int, int, int, int]) -> None:
    for seed in range(20):
        assert sample_crop(height, width, np.random.default_rng(seed)) == box


@pytest.mark.parametrize("shape", [(32, 32), (20, 41), (1, 1), (64, 64)])
def test_small_images_are_resized_to_the_square(shape: tuple[int, int], resizer: str) -> None:
    data = encode(photograph(3, 64, 64)[: shape[0], : shape[1]], "PNG")
    expected = pillow(data).resize((32, 32), BICUBIC)
    assert difference(eval_image(data, 32), expected).mean() <= (0.02 if resizer == "fast" else 0)
    if shape == (32, 32):
        np.testing.assert_array_equal(eval_image(data, 32), expected)


@pytest.mark.parametrize("image_size", [8, 32])
def test_small_training_crop_is_a_shifted_image_in_black(image_size: int) -> None:
    pixels = np.maximum(photograph(4, image_size, image_size), 1)
    data = encode(pixels, "PNG")
    padded = np.zeros((image_size + 8, image_size + 8, 3), np.uint8)
    padded[4:-4, 4:-4] = pixels
    windows = np.lib.stride_tricks.sliding_window_view(padded, (image_size, image_size), (0, 1))
    windows = np.moveaxis(windows, 2, -1)  # (9, 9, S, S, 3)
    counts = np.zeros((9, 9), int)
    rng = np.random.default_rng(0)
    for _ in range(1000):
        crop = train_image(data, image_size, rng, flip=False)
        ((top, left),) = np.argwhere((windows == crop).all(axis=(2, 3, 4)))
        counts[top, left] += 1
    assert counts.all()
    assert stats.chisquare(counts.ravel()).pvalue > 0.01


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("image_size", [32, 224, 384])
def test_one_pixel(kind: str, image_size: int, resizer: str) -> None:
    data = encode(np.full((1, 1, 3), 200, np.uint8), kind)
    crop = eval_image(data, image_size)
    assert crop.shape == (image_size, image_size, 3) and (crop == 200).all()
    assert (train_image(data, 224, np.random.default_rng(0), flip=True) == 200).all()
