"""Class folders: what counts as a class and a picture, what is left out, and what is refused."""

import io
import pickle
import shutil
from pathlib import Path

import pytest
from PIL import Image

from stvit_jax.data.sources import open_source
from stvit_jax.errors import UserError


def write_images(root: Path, files: dict[str, int]) -> None:
    for name, grey in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), grey).save(root / name)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    write_images(tmp_path / "train", {"b/2.png": 30, "b/1.PNG": 20, "a/1.jpeg": 10})
    write_images(tmp_path / "val", {"a/x.png": 40, "b/y.png": 50})
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    return tmp_path


def test_folders_are_classes_by_name(folders: Path) -> None:
    train = pickle.loads(pickle.dumps(open_source("folder", "", str(folders), train=True)))
    assert train.class_names == ("a", "b") and train.num_classes == 2
    read = [(Image.open(io.BytesIO(x["image"])).getpixel((0, 0)), x["label"]) for x in train]
    assert read == [(10, 0), (20, 1), (30, 1)]
    val = open_source("folder", "", str(folders), train=False)
    assert [features["label"] for features in val] == [0, 1]


def test_folder_mistakes(folders: Path) -> None:
    def error(train: bool) -> str:
        with pytest.raises(UserError) as raised:
            source = open_source("folder", "", str(folders), train=train)
            source[0]
        return str(raised.value)

    (folders / "train" / "c").mkdir()
    assert "different classes (only in one: c)" in error(train=False)
    (folders / "val" / "c").mkdir()
    (folders / "train" / "c" / "x.png").mkdir()
    assert "train/c holds no images" in error(train=True)
    shutil.rmtree(folders / "val")
    assert "val does not exist" in error(train=False) and "class folders under" in error(
        train=False
    )
    shutil.rmtree(folders / "train")
    assert "train does not exist" in error(train=True)
    (folders / "train").mkdir()
    assert "has no class folders" in error(train=True)


def test_a_file_that_vanished_is_named(folders: Path) -> None:
    source = open_source("folder", "", str(folders), train=True)
    (folders / "train" / "b" / "2.png").unlink()
    with pytest.raises(UserError, match="train/b/2.png"):
        source[2]
