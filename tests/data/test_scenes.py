"""Sets of scenes on disk: what is opened, and what is refused by name."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stvit_jax.data.annotations import WrongAnnotation, read_annotation
from stvit_jax.data.decode import decode_rgb
from stvit_jax.data.scenes import test_scene
from stvit_jax.data.sources import scenes
from stvit_jax.data.sources.scenes import open_scenes
from stvit_jax.errors import UserError
from tests import mini_ade


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mini_ade.write(tmp_path_factory.mktemp("ade"))


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    """A miniature ADE20K that the test may spoil."""
    return Path(shutil.copytree(written, tmp_path / "ADEChallengeData2016"))


def refusal(root: Path | str, source: str = "ade20k", *, train: bool = True) -> str:
    with pytest.raises(UserError) as raised:
        open_scenes(source, str(root), train=train)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def write_annotation(root: Path, values: np.ndarray, number: int = 1) -> None:
    Image.fromarray(values).save(root / f"annotations/training/ADE_train_{number:08}.png")


def test_ade20k_has_its_classes_and_colours(written: Path) -> None:
    train = open_scenes("ade20k", str(written), train=True)
    around = open_scenes("ade20k", str(written.parent), train=False)
    assert (len(train), len(around)) == (8, 5) and train.num_classes == 150
    assert train.class_names[:8] == (
        *("wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed"),
    )
    assert train.class_names[149] == "flag" and len(set(train.class_names)) == 150
    assert train.palette.shape == (150, 3) and train.palette.dtype == np.uint8
    assert train.palette[[0, 2, 149]].tolist() == [[120, 120, 120], [6, 230, 230], [92, 0, 255]]
    assert train.name == f"{written}/images/training"

    copy = pickle.loads(pickle.dumps(train))
    assert copy.where(2) == f"{written}/images/training/ADE_train_00000003.jpg"
    assert len(pickle.dumps(train)) < 10_000
    sizes = copy.sizes()
    assert sizes.shape == (8, 2) and len({tuple(size) for size in sizes.tolist()}) == 7
    labels = set()
    for index in range(8):
        features = copy[index]
        label = read_annotation(features["annotation"], 150)
        assert decode_rgb(features["image"]).shape[:2] == label.shape == tuple(sizes[index])
        labels |= set(np.unique(label).tolist())
    assert labels == {0, 2, 4, 12, 20, 255}


def test_a_folder_with_classes_of_its_own(root: Path) -> None:
    for kind in ("images", "annotations"):
        for split, other in (("training", "train"), ("validation", "val")):
            (root / kind / split).rename(root / kind / other)
        nested = root / kind / "train" / "b"  # in the order of paths, formats mixed
        nested.mkdir()
    for kind in ("images", "annotations"):
        copy = root / kind / "train" / "b" / "x.png"
        shutil.copy(root / "annotations/train/ADE_train_00000001.png", copy)
    (root / "classes.txt").write_text("# mine\n" + "".join(f"thing {i}\n\n" for i in range(21)))
    train = open_scenes("segmentation_folder", str(root), train=True)
    assert train.class_names == tuple(f"thing {i}" for i in range(21))
    assert len({tuple(colour) for colour in train.palette.tolist()}) == 21
    assert train.palette[:3].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    assert [Path(train.where(i)).name for i in (0, 7, 8)] == [
        *("ADE_train_00000001.jpg", "ADE_train_00000008.jpg", "x.png"),
    ]
    assert train[8]["annotation"] == train[0]["annotation"]
    assert len(open_scenes("segmentation_folder", str(root), train=False)) == 5


def test_what_is_no_set_of_scenes(root: Path) -> None:
    assert "'folder' is unknown for segmentation: use 'ade20k'" in refusal(root, "folder")
    assert "data.dir is empty: data.source=ade20k needs data.dir with ADE" in refusal("")
    assert "nowhere does not exist: correct it" in refusal(root / "nowhere")
    assert f"{root}/images/images is no folder" in refusal(root / "images")
    assert f"{root}/classes.txt is missing: list the classes" in refusal(
        root, "segmentation_folder"
    )
    for text, words in (
        (b"", "lists 0 classes"),
        (b"a\nb\na\n", r"names classes twice (a)"),
        (b"\xff\xfe", "is not text in UTF-8"),
        (b"\n".join(b"%d" % i for i in range(255)), "lists 255 classes: list 1 to 254"),
    ):
        (root / "classes.txt").write_bytes(text)
        assert words in refusal(root, "segmentation_folder")
    shutil.rmtree(root / "annotations/validation")
    assert f"{root}/annotations/validation does not exist: put the annotations" in refusal(
        root, train=False
    )
    shutil.rmtree(root / "images/training")
    (root / "images/training").mkdir()
    assert f"{root}/images/training holds no images: put some there" in refusal(root)


def test_what_has_no_partner(root: Path, capsys: pytest.CaptureFixture) -> None:
    (root / "images/training/notes.txt").write_text("no image")
    open_scenes("ade20k", str(root), train=True)
    assert f"left out in {root}/images/training: 1 files of suffix .txt" in capsys.readouterr().out
    moved = root / "annotations/training/ADE_train_00000002.png"
    moved.rename(root / "annotations/training/other.png")
    assert (
        f"1 of the 8 images in {root}/images/training have no annotation in "
        f"{root}/annotations/training (ADE_train_00000002.jpg): add a PNG file of the same name"
    ) in refusal(root)
    (root / "images/training/ADE_train_00000002.jpg").unlink()
    assert (
        f"1 of the 8 annotations in {root}/annotations/training have no image in "
        f"{root}/images/training (other.png): add it, or remove them"
    ) in refusal(root)
    shutil.copy(
        root / "images/training/ADE_train_00000001.jpg",
        root / "images/training/ADE_train_00000001.jpeg",
    )
    assert "ADE_train_00000001.jpeg and ADE_train_00000001.jpg" in refusal(root)


@pytest.mark.parametrize(
    "values, words",
    [
        (np.ones((67, 91, 3), np.uint8), "mode RGB: write it as a PNG with one byte a pixel"),
        (np.full((67, 91), 151, np.uint8), "1..150 (the classes) and 255 (ignored), but 151"),
        (np.ones((66, 91), np.uint8), "91 x 66 pixels, the image 91 x 67: make them the same"),
    ],
)
def test_wrong_annotations_are_named(root: Path, values: np.ndarray, words: str) -> None:
    write_annotation(root, values)
    image = f"{root}/images/training/ADE_train_00000001.jpg"
    start = f"1 of the 8 annotations looked at in {root}/annotations/training are wrong; the first"
    assert (found := refusal(root)).startswith(f"{start}: {image}: its annotation has ")
    assert words in found
    assert len(open_scenes("ade20k", str(root), train=False)) == 5  # each split by itself


def test_one_that_was_not_looked_at_is_unreadable_in_its_turn(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenes, "LOOKED_AT", 4)
    write_annotation(root, np.ones((66, 91), np.uint8), number=8)
    source = open_scenes("ade20k", str(root), train=True)
    with pytest.raises(WrongAnnotation, match="make them the same size"):
        test_scene(**source[7], classes=150)


def test_damage_ends_nothing_but_when_all_is_damaged(root: Path) -> None:
    folder = root / "annotations/training"
    whole = (folder / "ADE_train_00000001.png").read_bytes()
    (folder / "ADE_train_00000001.png").write_bytes(whole[: len(whole) // 2])
    (root / "images/training/ADE_train_00000002.jpg").write_bytes(b"no image")
    (folder / "ADE_train_00000003.png").write_bytes(b"")
    source = open_scenes("ade20k", str(root), train=True)
    sizes = source.sizes()
    assert sizes[:3].tolist() == [[67, 91], [96, 64], [48, 48]]
    for path in folder.iterdir():
        path.write_bytes(b"")
    assert "none of the 8 annotations looked at in" in (found := refusal(root))
    assert "can be read; the first: " in found and "an empty file" in found
    (root / "images/training/ADE_train_00000002.jpg").write_bytes(b"no image")
    assert source.sizes()[:3].tolist() == [[67, 91], [0, 0], [48, 48]]
    (folder / "ADE_train_00000001.png").unlink()
    with pytest.raises(UserError, match=r"ADE_train_00000001\.png is missing: restore it"):
        source[0]


def test_annotations_without_a_class_are_counted(root: Path, capsys: pytest.CaptureFixture) -> None:
    for number, value in ((1, 0), (3, 255)):
        size = mini_ade.SIZES[number - 1]
        write_annotation(root, np.full(size, value, np.uint8), number)
    open_scenes("ade20k", str(root), train=True)
    line = f"2 of the 8 annotations looked at in {root}/annotations/training have no class: all"
    assert line in capsys.readouterr().out
    for number in range(1, 9):
        size = mini_ade.SIZES[(number - 1) % len(mini_ade.SIZES)]
        write_annotation(root, np.zeros(size, np.uint8), number)
    assert "has a class, all of them are ignored" in refusal(root)
