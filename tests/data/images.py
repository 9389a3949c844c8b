"""Pictures that tests of decoding encode, and what Pillow makes of them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


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
