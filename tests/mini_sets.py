"""Miniatures of sets that tfds knows: its own builders write them; nothing is downloaded."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import registered


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


def prepare_own(
    name: str,
    data_dir: Path,
    splits: dict[str, list[int]],
    shards: int = 1,
    classes: int = 3,
    file_format: str = "array_record",
) -> Path:
    """Prepares a set that tfds does not know, of small pictures with these labels.

    Returns:
      its version directory.
    """

    def info(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=classes),
        }
        return tfds.core.DatasetInfo(
            builder=builder,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    with registered.skip_registration():
        members = {"VERSION": tfds.core.Version("1.0.0"), "_info": info, "name": name}
        members |= dict.fromkeys(("_split_generators", "_generate_examples"))
        builder = type(name, (tfds.core.GeneratorBasedBuilder,), members)(data_dir=str(data_dir))
    builder._split_generators = lambda dl_manager: {
        split: ((i, {"image": picture(i, (8, 8), "PNG"), "label": x}) for i, x in enumerate(labels))
        for split, labels in splits.items()
    }
    config = tfds.download.DownloadConfig(num_shards=shards)
    builder.download_and_prepare(file_format=file_format, download_config=config)
    return Path(builder.data_path)


def change_info(version_dir: Path, **fields: object) -> None:
    """Overwrites fields of a prepared set's `dataset_info.json`."""
    path = version_dir / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def picture(number: int, size: tuple[int, int] = (50, 40), form: str = "JPEG") -> bytes:
    """Encoded noise of `size` (width, height), another for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()
