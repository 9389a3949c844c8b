"""MNIST's file format to class folders."""

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stvit_jax.data.mnist import main, write_folders
from stvit_jax.data.sources import open_source
from stvit_jax.errors import UserError


def write_idx(path: Path, array: np.ndarray) -> None:
    sizes = np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()))


@pytest.fixture
def mnist(tmp_path: Path) -> tuple[Path, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """A directory with 30 and 12 pictures of 5 x 4 pixels, and what they are."""
    rng = np.random.default_rng(0)
    data = {}
    for name, split, count in (("train", "train", 30), ("t10k", "val", 12)):
        images = rng.integers(0, 256, (count, 5, 4), np.uint8)
        labels = (np.arange(count) % 3).astype(np.uint8)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", labels)
        data[split] = images, labels
    return tmp_path, data


def test_every_image_lands_in_the_folder_of_its_label(mnist) -> None:
    source, data = mnist
    main([str(source), str(source / "folders")])
    for split, (images, labels) in data.items():
        written = open_source("folder", "", str(source / "folders"), train=split == "train")
        assert written.class_names == ("0", "1", "2")
        found = [
            (x["label"], np.asarray(Image.open(io.BytesIO(x["image"]))).tobytes()) for x in written
        ]
        assert sorted(found) == sorted(
            (int(label), image.tobytes()) for image, label in zip(images, labels, strict=True)
        )


def test_mistakes_are_named(mnist) -> None:
    source, data = mnist
    with pytest.raises(UserError, match="exists already"):
        write_folders(source, source)
    labels = source / "t10k-labels-idx1-ubyte.gz"
    write_idx(labels, data["val"][1][:-1])
    with pytest.raises(UserError, match="12 images, but 11 labels"):
        write_folders(source, source / "folders")
    labels.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x09\0"))
    with pytest.raises(UserError, match="holds 1 values, not 9"):
        write_folders(source, source / "other")
    labels.write_bytes(b"no gzip")
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte.gz cannot be read"):
        write_folders(source, source / "other")
    labels.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(UserError, match="no idx file of uint8 with 1 dim"):
        write_folders(source, source / "other")
    labels.write_bytes(gzip.compress(b"\0\0\x08\x01\0"))
    with pytest.raises(UserError, match="no idx file of uint8 with 1 dim"):
        write_folders(source, source / "other")
    write_idx(labels, data["val"][1])
    sound = labels.read_bytes()
    for damaged in (sound[:-9], sound[:14] + bytes([sound[14] ^ 255]) + sound[15:]):
        labels.write_bytes(damaged)
        with pytest.raises(UserError, match="t10k-labels-idx1-ubyte.gz cannot be read"):
            write_folders(source, source / "other")
    labels.write_bytes(sound)
    (source / "file").touch()
    with pytest.raises(UserError, match="file/other cannot be written: Not a directory"):
        write_folders(source, source / "file" / "other")
    assert not (source / "other").exists()
    labels.unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        write_folders(source, source / "other")
