"""Decoding against Pillow: formats, depths, sizes, and what is no image."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from stvit_jax.data import decode
from stvit_jax.data.decode import UnreadableImage, eval_image, train_image
from stvit_jax.data.signatures import HEAD, image_format
from tests.data.images import difference, encode, photograph, pillow, png


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
