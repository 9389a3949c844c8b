"""Class folders: what counts as a class and a picture, what is left out, and what is refused."""

import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
from PIL import Image

from stvit_jax.data.decode import decode_rgb
from stvit_jax.data.sources import open_source
from stvit_jax.errors import UserError
from tests.data.processes import run_script, without_privileges


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


def refusal(root: Path | str, train: bool) -> str:
    """What the error says."""
    with pytest.raises(UserError) as raised:
        open_source("folder", "", str(root), train=train)
    return str(raised.value)


def said(capsys: pytest.CaptureFixture, root: Path, train: bool) -> list[str]:
    """The lines that opening a split prints."""
    capsys.readouterr()
    open_source("folder", "", str(root), train=train)
    return capsys.readouterr().out.splitlines()


def test_a_folder_without_the_layout(folders: Path) -> None:
    layout = "data.source=folder needs data.dir with class folders under train/ and val/"
    assert refusal("", True) == f"data.dir is empty: {layout}"
    assert "nowhere does not exist: correct it" in refusal(folders / "nowhere", True)
    assert "x.png is a file" in refusal(folders / "val/a/x.png", True)
    assert f"set data.dir={folders}" in refusal(folders / "train", True)
    around = folders / "around"
    for split in ("train", "val"):
        shutil.copytree(folders / split, around / "set" / split)
    assert f"set data.dir={around}/set" in refusal(around, True)
    shutil.rmtree(around)
    (folders / "train").rename(folders / "Train")
    assert refusal(folders, True) == (
        f"{folders}/train does not exist (there: Train/, val/): rename Train to train; {layout}"
    )
    (folders / "Train").rename(folders / "apple")
    assert f"{folders}/train does not exist (there: apple/, val/): {layout}" in refusal(
        folders, True
    )
    (folders / "apple" / "a").rename(folders / "apple" / "c")
    assert open_source("folder", "", str(folders), train=False).class_names == ("a", "b")
    shutil.rmtree(folders / "val")
    (folders / "train").mkdir()
    assert "train has no class folders: put one folder of images per class there" in refusal(
        folders, True
    )
    (folders / "train" / "x.png").touch()
    assert "(left out: 1 files beside the class folders (x.png))" in refusal(folders, True)


@pytest.mark.parametrize("name", ["valid", "validation", "test", "Val", "dev"])
def test_other_names_of_val_are_taken_and_said(folders: Path, name: str, capsys) -> None:
    (folders / "val").rename(folders / name)
    line = f"there is no val/ in {folders}: {name}/ is evaluated on"
    assert said(capsys, folders, train=False) == [line]
    assert len(open_source("folder", "", str(folders), train=True)) == 3  # nothing is held out
    write_images(folders / "testing", {"a/1.png": 5})
    assert said(capsys, folders, train=False) == [f"{line} (not on testing/)"]
    assert open_source("folder", "", str(folders), train=False).root == str(folders / name)


def test_class_folders_alone(folders: Path, capsys) -> None:
    """Directly in data.dir: a part is held out."""
    root = folders / "train"
    write_images(root, {f"a/{i}.png": 5 for i in range(40)})
    alone = root.rename(folders / "pictures")
    line = f"{alone}/val does not exist: a tenth of {alone} is held out to evaluate on"
    lines = said(capsys, alone, train=True)
    assert line in lines
    parts = [open_source("folder", "", str(alone), train=split) for split in (True, False)]
    assert parts[0].class_names == parts[1].class_names == ("a", "b")
    files = [{part.where(i) for i in range(len(part))} for part in parts]
    assert files[0] and files[1] and not files[0] & files[1]
    assert files[0] | files[1] == {
        str(p) for p in alone.rglob("*") if p.suffix.lower() in (".png", ".jpeg")
    }


def test_flat_pictures_with_a_list(folders: Path, capsys) -> None:
    """Those of tiny-imagenet, of ImageNet's competition, and a plain one."""
    shutil.rmtree(folders / "val")
    (folders / "train" / "a" / "images").mkdir()
    for path in (folders / "train" / "a").glob("*.*"):
        path.rename(folders / "train" / "a" / "images" / path.name)
    write_images(folders / "val", {f"images/{i}.JPEG": i for i in range(3)})
    train = open_source("folder", "", str(folders), train=True)
    assert [x["label"] for x in train] == [0, 1, 1] and "/a/images/" in train.where(0)
    flat = folders / "val"
    assert "no list says what its images show" in refusal(folders, train=False)
    contents = {
        flat / "val_annotations.txt": "0.JPEG\tb\t0\t0\t9\t9\n2.JPEG\ta\t0\t0\t9\t9\n",
        folders
        / "LOC_val_solution.csv": "ImageId,PredictionString\n2,a 1 2 3 4 a 1 2 3 4\n0,b 1 2\n",
        folders / "val.txt": "val/0.JPEG 1\n\nimages/2.JPEG a\n",
    }
    for path, text in contents.items():
        path.write_text(text)
        assert said(capsys, folders, train=False) == [
            f"{flat} has no class folders: {path} says what its 2 images show"
        ]
        val = open_source("folder", "", str(folders), train=False)
        assert [x["label"] for x in val] == [1, 0] and val.class_names == ("a", "b")
        assert [val.where(i) for i in range(2)] == [f"{flat}/images/{i}.JPEG" for i in (0, 2)]
        path.unlink()
    for text, message in (
        ("0.JPEG c\n", "entry 1: 'c' is no class folder of train/ (a, b)"),
        ("0.JPEG 2\n", "entry 1: '2' is no class"),
        ("0.JPEG a\n7.JPEG a\n", f"entry 2: there is no 7.JPEG in {flat}"),
        ("0.JPEG\n", "is no list of pictures and classes"),
        ("\n", "lists no pictures"),
    ):
        (folders / "val.txt").write_text(text)
        assert message in refusal(folders, train=False)


def test_classes_of_train_and_val(folders: Path, capsys: pytest.CaptureFixture) -> None:
    """Those of train count; val may lack images of some of them."""
    write_images(folders / "train", {"aa/1.png": 5})
    line = f"{folders}/val has no images of 1 of 3 classes: aa"
    assert said(capsys, folders, train=False) == [line]
    (folders / "val" / "aa").mkdir()
    assert said(capsys, folders, train=False) == []  # it has been said
    val = open_source("folder", "", str(folders), train=False)
    assert [x["label"] for x in val] == [0, 2] and val.class_names == ("a", "aa", "b")
    (folders / "train" / "c").mkdir()
    (folders / "train" / "c" / "x.png").mkdir()
    words = refusal(folders, train=True)
    assert f"{folders}/train/c holds no images (left out: " in words
    assert "1 folders inside of class folders (c/x.png)" in words and " .jfif " in words
    write_images(folders / "val", {"new/1.png": 5})
    assert f"{folders}/val has classes that {folders}/train does not have (new)" in refusal(
        folders, train=False
    )
    shutil.rmtree(folders / "val")
    (folders / "val").mkdir()
    words = f"3 class folders of {folders}/val (a, aa, b) hold no images"
    shutil.rmtree(folders / "train" / "c")
    assert words in refusal(folders, train=False)


def test_what_is_left_out_is_said(folders: Path, capsys: pytest.CaptureFixture) -> None:
    train = folders / "train"
    write_images(
        train,
        {".ipynb_checkpoints/1.png": 0, "__MACOSX/1.png": 0, "@eaDir/1.png": 0, "a/old/3.png": 0},
    )
    for name in ("a/._1.jpeg", "a/.DS_Store", "b/Thumbs.db", "b/desktop.ini"):
        (train / name).write_bytes(b"\0\5\26\7")
    for number in range(12):
        (train / "a" / f"{number}.heic").touch()
    (train / "a" / "README").write_text("no image")
    (train / "loose.png").touch()
    (train / "b" / "gone.png").symlink_to("/not/mounted.png")
    (train / "b" / "loop.png").symlink_to("loop.png")
    (train / "gone").symlink_to("/not/mounted")
    os.mkfifo(train / "b" / "pipe.png")
    (line,) = said(capsys, folders, train=True)
    start, _, rest = line.partition(": ")
    assert start == f"left out in {train}"
    for words in (
        "12 files of suffix .heic (a/",
        "7 hidden or made by the system (",
        "2 broken links (b/",
        "1 files of suffix .txt (a/notes.txt)",
        "1 files without suffix that are no images (a/README)",
        "1 folders inside of class folders (a/old)",
        "1 files beside the class folders (loose.png)",
        "1 broken links beside the class folders (gone)",
        "1 special files (b/pipe.png)",
    ):
        assert words in rest, words
    source = open_source("folder", "", str(folders), train=True)
    assert source.class_names == ("a", "b") and len(source) == 3
    assert said(capsys, folders, train=False) == []


def test_names_do_not_steer_a_terminal(folders: Path, capsys: pytest.CaptureFixture) -> None:
    folder = folders / "train" / "b\x1b[2J"
    folder.mkdir()
    for name in ("1\n2.png", "3.\x1b[3J"):
        (folder / name).touch()
    lines = said(capsys, folders, train=True)
    source = open_source("folder", "", str(folders), train=True)
    (folder / "1\n2.png").unlink()
    with pytest.raises(UserError) as error:
        source[len(source) - 1]
    for line in (*lines, str(error.value)):
        assert line.isprintable() and "\\x1b[" in line


def test_images_of_every_suffix_and_of_none(folders: Path, capsys: pytest.CaptureFixture) -> None:
    formats = {"JPEG": "jfif JPE JPG", "PNG": "PNG", "AVIF": "avif", "JPEG2000": "jp2 J2K"}
    images = {"train": 0}
    for form, suffixes in formats.items():
        data = io.BytesIO()
        Image.new("RGB", (8, 8), (200, 0, 0)).save(data, form)
        for suffix in suffixes.split():
            (folders / "train" / "b" / f"more.{suffix}").write_bytes(data.getvalue())
        (folders / "train" / "b" / f"n0144_{form}").write_bytes(data.getvalue())
        images["train"] += len(suffixes.split()) + 1
    (folders / "train" / "a" / "notes.txt").unlink()
    assert said(capsys, folders, train=True) == []
    source = open_source("folder", "", str(folders), train=True)
    assert len(source) == 3 + images["train"]
    for features in source:
        assert decode_rgb(features["image"]).shape[-1] == 3


def test_numbers_sort_as_numbers(folders: Path, capsys: pytest.CaptureFixture) -> None:
    root = folders / "numbered"
    for split in ("train", "val"):
        write_images(root / split, {f"{label}/{split}.png": label for label in range(12)})
    lines = said(capsys, root, train=True)
    assert lines == [
        "all class folders have numbers for names: their order is that of the numbers "
        "(0, 1, 2, ..., 11), not that of the text"
    ]
    assert said(capsys, root, train=False) == []
    for train in (True, False):
        source = open_source("folder", "", str(root), train=train)
        assert source.class_names == tuple(map(str, range(12)))
        greys = [Image.open(io.BytesIO(x["image"])).getpixel((0, 0)) for x in source]
        assert greys == [x["label"] for x in source] == list(range(12))
    write_images(root / "train", {"twelve/1.png": 0})
    source = open_source("folder", "", str(root), train=True)
    assert source.class_names[:3] == ("0", "1", "10")


def test_a_tenth_is_held_out_without_val(folders: Path, capsys: pytest.CaptureFixture) -> None:
    root = folders / "set"
    write_images(root / "train", {f"{'abc'[n % 3]}/{n:03}.png": n for n in range(200)})
    write_images(root / "train", {"rare/1.png": 0})
    lines = said(capsys, root, train=False)
    assert lines == [
        f"{root}/val does not exist: a tenth of {root}/train is held out to evaluate on",
        "the held-out tenth has no images of 1 of 4 classes: rare",
    ]

    def names(train: bool) -> set[str]:
        source = open_source("folder", "", str(root), train=train)
        assert source.class_names == ("a", "b", "c", "rare")
        return {source.where(i) for i in range(len(source))}

    train, held_out = names(True), names(False)
    assert not train & held_out and len(train | held_out) == 201
    assert 10 <= len(held_out) <= 35
    write_images(root / "train", {f"a/more{n}.png": 0 for n in range(20)})
    assert train <= names(True) and held_out <= names(False)  # for good
    shutil.rmtree(root / "train")
    write_images(root / "train", {"a/1.png": 0, "b/1.png": 0})
    assert "train has too few images to hold some out" in refusal(root, train=False)


@pytest.mark.parametrize("denied", ["", "train", "train/b"])
@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_folder_that_may_not_be_read(folders: Path, denied: str, mode: int) -> None:
    program = """
import sys
from stvit_jax.data.decode import decode_rgb
from stvit_jax.data.sources import open_source
from stvit_jax.errors import UserError
from tests.data.processes import run_script, without_privileges

try:
    open_source("folder", "", sys.argv[1], train=True)
except UserError as error:
    print(error)
"""
    root = folders / "set"
    root.mkdir()
    for name in ("train", "val"):
        (folders / name).rename(root / name)
    (root / denied).chmod(mode)
    try:
        done = run_script(program, folders, root, before=without_privileges())
    finally:
        (root / denied).chmod(0o755)
    named = str(root / denied).rstrip("/")
    assert done.stdout == (
        f"{named} cannot be read (Permission denied): give this user the right to read it\n"
    ), done.stderr


def test_a_file_that_vanished_is_named(folders: Path) -> None:
    source = open_source("folder", "", str(folders), train=True)
    (folders / "train" / "b" / "2.png").unlink()
    with pytest.raises(UserError, match="train/b/2.png"):
        source[2]
