"""Decoding and the host's crops, against Pillow, the golden crops and the recipe's formulas."""

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from stvit_jax.data import decode
from stvit_jax.data.decode import UnreadableImage, eval_image, sample_crop, train_image
from stvit_jax.data.signatures import HEAD, image_format
from stvit_jax.errors import UserError

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "eval_transform.npz")
BICUBIC = Image.Resampling.BICUBIC


def photograph(seed: int, height: int, width: int) -> np.ndarray:
    """Something with a photograph's spectrum (1/f), edges and grain: uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    amplitude = 60 / np.maximum(frequency, 1 / max(height, width)) ** 1.1
    phase = np.exp(2j * np.pi * rng.random((3, *frequency.shape)))
    image = np.moveaxis(np.fft.irfft2(amplitude * phase, (height, width)), 0, -1)
    image = 128 + 50 * (image + image[..., :1]) / image.std()
    for _ in range(8):
        top, left = rng.integers(height), rng.integers(width)
        image[top : top + height // 3, left : left + width // 3] *= rng.uniform(0.4, 1.2, 3)
    return np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)


def encode(pixels: np.ndarray | Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The bytes that Pillow writes."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, color_type: int, rows: bytes) -> bytes:
    """A PNG of any header, for what Pillow does not write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def pillow(data: bytes) -> Image.Image:
    """What Pillow makes of the bytes."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def difference(image: np.ndarray, other: np.ndarray | Image.Image) -> np.ndarray:
    """Absolute difference in levels."""
    return np.abs(image.astype(int) - np.asarray(other).astype(int))


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


def picture(mode: str) -> Image.Image:
    return Image.fromarray(photograph(5, 32, 32)).convert(mode)


ALPHA = np.dstack([photograph(5, 32, 32), np.arange(1024).reshape(32, 32) % 256]).astype(np.uint8)
PALETTE = picture("RGB").quantize(64)
ORIENTATION = Image.Exif()
ORIENTATION[0x0112] = 6
SAME_AS_PILLOW = {
    "jpeg 4:4:4": encode(picture("RGB"), subsampling=0),
    "jpeg 4:2:2": encode(picture("RGB"), subsampling=1),
    "jpeg 4:2:0": encode(picture("RGB"), subsampling=2),
    "jpeg progressive": encode(picture("RGB"), progressive=True),
    "jpeg restart markers": encode(picture("RGB"), restart_marker_blocks=1),
    "jpeg stored as RGB": encode(picture("RGB"), keep_rgb=True),
    "jpeg grey": encode(picture("L")),
    "jpeg CMYK": encode(picture("CMYK")),
    "jpeg turned by EXIF": encode(picture("RGB"), exif=ORIENTATION),
    "jpeg with two pictures": encode(picture("RGB"), "MPO", append_images=[picture("RGB")]),
    "jpeg with bytes after its end": encode(picture("RGB")) + b"more",
    "png": encode(picture("RGB"), "PNG"),
    "png grey": encode(picture("L"), "PNG"),
    "png grey and alpha": encode(Image.fromarray(ALPHA).convert("LA"), "PNG"),
    "png alpha": encode(ALPHA, "PNG"),
    "png one colour transparent": encode(picture("RGB"), "PNG", transparency=(1, 2, 3)),
    "png one bit": encode(picture("1"), "PNG"),
    "palette": encode(PALETTE, "PNG"),
    "palette, one transparent": encode(PALETTE, "PNG", transparency=3),
    "palette, alpha": encode(PALETTE, "PNG", transparency=bytes(range(64))),
    "gif": encode(picture("P"), "GIF"),
    "gif, transparent": encode(picture("P"), "GIF", transparency=2),
    "bmp": encode(picture("RGB"), "BMP"),
    "ppm": encode(picture("RGB"), "PPM"),
    "tiff": encode(picture("RGB"), "TIFF"),
    "tiff CMYK": encode(picture("CMYK"), "TIFF"),
    "webp": encode(picture("RGB"), "WEBP", lossless=True),
    "avif": encode(picture("RGB"), "AVIF"),
    "jpeg 2000": encode(picture("RGB"), "JPEG2000"),
    "jpeg 2000 grey": encode(picture("L"), "JPEG2000"),
}


@pytest.mark.filterwarnings("error:Palette images:UserWarning")
@pytest.mark.parametrize("name", SAME_AS_PILLOW)
def test_format_reads_as_pillow_converts_it(name: str) -> None:
    data = SAME_AS_PILLOW[name]
    with Image.open(io.BytesIO(data)) as image:
        image.info.pop("transparency", None)  # convert would warn of it
        expected = image.convert("RGB")
    assert np.ptp(expected) > 100
    np.testing.assert_array_equal(eval_image(data, 32), expected)
    crop = train_image(data, 32, np.random.default_rng(0), flip=False)
    assert crop.shape == (32, 32, 3) and crop.any()


def test_exif_orientation_is_ignored() -> None:
    plain = eval_image(SAME_AS_PILLOW["jpeg 4:2:0"], 32)
    np.testing.assert_array_equal(eval_image(SAME_AS_PILLOW["jpeg turned by EXIF"], 32), plain)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (17, 33), (63, 250)])
def test_jpeg_pixels_are_pillows(size: tuple[int, int], subsampling: int) -> None:
    data = encode(photograph(6, 64, 256)[: size[0], : size[1]], subsampling=subsampling)
    np.testing.assert_array_equal(decode.decode_rgb(data), pillow(data))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled(kind: str) -> None:
    values = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
    image = eval_image(encode(values, kind), 32)
    np.testing.assert_array_equal(image, np.repeat((values >> 8)[..., None], 3, axis=-1))


def ramp(high: float, kind: type) -> np.ndarray:
    """From 0 to `high`."""
    return np.linspace(0, high, 1024).astype(kind).reshape(32, 32)


RANGES = {
    "float tiff, 0..1": ("TIFF", ramp(1, np.float32), 255),
    "float tiff, 0..1 and a little": ("TIFF", ramp(1.0005, np.float32), 255),
    "float tiff, 0..255": ("TIFF", ramp(255, np.float32), 1),
    "int32 tiff, 0..255": ("TIFF", ramp(255, np.int32), 1),
    "int32 tiff, 0..4095": ("TIFF", ramp(4095, np.int32), 1 / 16),
    "int32 tiff, 0..65535": ("TIFF", ramp(65535, np.int32), 1 / 256),
    "16-bit png, 0..255": ("PNG", ramp(255, np.uint16), 1),
    "16-bit png, 0..1": ("PNG", ramp(1.5, np.uint16), 1),
    "16-bit png, 0..4095": ("PNG", ramp(4095, np.uint16), 1 / 16),
    "16-bit png, 0..4096": ("PNG", ramp(4096, np.uint16), 1 / 256),
    "16-bit pgm, 0..255": ("PPM", ramp(255, np.uint16), 1),
}


@pytest.mark.parametrize("name", RANGES)
def test_grey_is_scaled_by_its_range(name: str) -> None:
    kind, values, factor = RANGES[name]
    pixels = decode.decode_rgb(encode(values, kind))
    expected = np.floor(values * factor).clip(0, 255)[..., None]
    assert difference(pixels, expected).max() <= (1 if values.dtype.kind == "f" else 0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (ramp(70000, np.int32), "from 0 to 70000"),
        (ramp(255, np.int32) - 1, "from -1 to 254"),
        (ramp(1.5, np.float32), "from 0 to 1.5"),
        (ramp(1000, np.float32), "from 0 to 1000"),
        (ramp(2, np.float32) - 1, "from -1 to 1"),
        (ramp(1, np.float32) * np.nan, "from nan to nan"),
    ],
)
def test_grey_of_no_known_scale_is_refused(values: np.ndarray, words: str) -> None:
    with pytest.raises(UnreadableImage, match=f"grey values {words}, .*write it with 8 bits"):
        eval_image(encode(values, "TIFF"), 32)


def deep(kind: str, values: np.ndarray) -> bytes:
    """16-bit colour, which Pillow does not write."""
    height, width, channels = values.shape
    if kind == "PNG":
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
        return png(width, height, 16, {2: 4, 3: 2, 4: 6}[channels], rows)
    return b"P6 %d %d 65535\n" % (width, height) + values.astype(">u2").tobytes()


@pytest.mark.parametrize(("kind", "channels"), [("PNG", 2), ("PNG", 3), ("PNG", 4), ("PPM", 3)])
def test_sixteen_bit_colour_that_would_be_black_is_refused(kind: str, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (32, 32, channels))
    with pytest.raises(UnreadableImage, match="16-bit colour that would be all but black"):
        eval_image(deep(kind, values), 32)
    values[0, 0, 0] = 5000
    assert 18 < decode.decode_rgb(deep(kind, values)).max() < 21


def test_sixteen_bit_colour_is_scaled() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (32, 32, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    np.testing.assert_array_equal(eval_image(png(32, 32, 16, 2, rows), 32), values >> 8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("image_size", [32, 224, 384])
def test_one_pixel(kind: str, image_size: int, resizer: str) -> None:
    data = encode(np.full((1, 1, 3), 200, np.uint8), kind)
    crop = eval_image(data, image_size)
    assert crop.shape == (image_size, image_size, 3) and (crop == 200).all()
    assert (train_image(data, 224, np.random.default_rng(0), flip=True) == 200).all()


JPEG = encode(photograph(7, 200, 300), quality=90)
PNG = encode(photograph(7, 200, 300), "PNG")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
UNREADABLE = {
    "empty": (b"", "no image that can be read, but an empty file"),
    "text": (b"404 not found", "404"),
    "noise": (np.random.default_rng(0).bytes(5000), "no image"),
    "jpeg, nothing but a start": (JPEG[:3], "it starts as JPEG, and is damaged"),
    "jpeg, header only": (JPEG[:400], "OSError: .+"),
    "jpeg, half": (JPEG[: len(JPEG) // 2], "truncated"),
    "jpeg, all but a hundred bytes": (JPEG[:-100], "truncated"),
    "jpeg, then text": (JPEG[:160] + b"404 not found" * 500, "OSError: .+"),
    "png, half": (PNG[: len(PNG) // 2], "truncated"),
    "png, one byte wrong": (PNG[:5000] + bytes([PNG[5000] ^ 255]) + PNG[5001:], "OSError: .+"),
    "gif, half": (encode(photograph(7, 200, 300), "GIF")[:5000], "truncated"),
    "webp, half": (encode(photograph(7, 200, 300), "WEBP")[:5000], "OSError: .+"),
    "avif, half": (encode(photograph(7, 200, 300), "AVIF")[:2000], ".+"),
    "jpeg 2000, half": (encode(photograph(7, 200, 300), "JPEG2000")[:5000], ".+"),
    "program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n", "PostScri"),
    "git-lfs": (POINTER, "but a git-lfs pointer"),
    "git-annex": (b"/annex/objects/SHA256E-s1--2.jpg\n", "but a git-annex pointer"),
    "html": (b"\n<!DOCTYPE html>\n<html><title>404</title>", "but an HTML page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "but an XML document"),
    "svg": (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
    "json": (b'{"error": "not found"}', "but JSON"),
    "zeros": (bytes(5000), "but 5000 zero bytes"),
    "macOS": (b"\0\5\26\7\0\2\0\0Mac OS X        ", "AppleDouble"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "but HEIC"),
    "film": (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "but a film"),
    "zip": (b"PK\3\4" + bytes(50), "but a zip archive"),
    "gzip": (b"\x1f\x8b\x08" + bytes(50), "but a compressed file"),
    "pdf": (b"%PDF-1.7\n", "but a PDF document"),
    "numpy": (b"\x93NUMPY\1\0", "but a NumPy array"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_bytes_give_the_reason(name: str) -> None:
    data, reason = UNREADABLE[name]
    for read in (
        lambda: eval_image(data, 224),
        lambda: train_image(data, 32, np.random.default_rng(0), flip=True),
    ):
        with pytest.raises(UnreadableImage, match=reason) as error:
            read()
        assert "\n" not in str(error.value)


def large(kind: str, width: int, height: int) -> bytes:
    """A file of a few bytes whose header claims the size."""
    if kind == "PNG":
        return png(width, height, 8, 2, b"\0" * 100)
    data = bytearray(encode(np.zeros((16, 16, 3), np.uint8)))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(("width", "height"), [(9_460, 9_460), (13_000, 13_000), (65_000, 65_000)])
def test_decompression_bomb_is_refused_by_its_header(kind: str, width: int, height: int) -> None:
    with pytest.raises(UnreadableImage, match=f"{width * height}|{width} x {height}"):
        eval_image(large(kind, width, height), 224)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_sound_image_beyond_the_limit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(photograph(8, 50, 40), kind)
    monkeypatch.setattr(decode, "MAX_PIXELS", 2000)
    assert eval_image(data, 224).any()
    monkeypatch.setattr(decode, "MAX_PIXELS", 1999)
    with pytest.raises(UnreadableImage, match="40 x 50 pixels are more than 1999"):
        eval_image(data, 224)


def test_a_defect_that_pillow_tolerates_is_tolerated() -> None:
    data = bytearray(JPEG)
    data[len(data) // 2] ^= 16
    np.testing.assert_array_equal(decode.decode_rgb(bytes(data)), pillow(bytes(data)))


@pytest.mark.parametrize("name", SAME_AS_PILLOW)
def test_every_format_is_known_by_its_first_bytes(name: str) -> None:
    format_ = Image.open(io.BytesIO(SAME_AS_PILLOW[name])).format
    assert image_format(SAME_AS_PILLOW[name][:HEAD]) == {"MPO": "JPEG"}.get(format_, format_)


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_image_is_not_taken_for_one(name: str) -> None:
    start = name.split(",")[0].upper().replace(" ", "")
    known = {"JPEG", "PNG", "GIF", "WEBP", "AVIF", "JPEG2000"}
    assert image_format(UNREADABLE[name][0]) == (start if start in known else None)
