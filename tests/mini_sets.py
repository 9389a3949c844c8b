"""Miniatures of sets that tfds knows: its own builders write them; nothing is downloaded."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def prepare(
    name: str, data_dir: Path, splits: dict[str, list[dict[str, Any]]], shards: int = 1
) -> None:
    """Prepares the set (`name` or `name/config`) with these examples in these splits."""
    builder = tfds.builder(name, data_dir=str(data_dir))
    builder._split_generators = lambda dl_manager: {
        split: enumerate(examples) for split, examples in splits.items()
    }
    config = tfds.download.DownloadConfig(num_shards=shards)
    builder.download_and_prepare(file_format="array_record", download_config=config)


def picture(number: int, size: tuple[int, int] = (50, 40), form: str = "JPEG") -> bytes:
    """Encoded noise of `size` (width, height), another for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()
