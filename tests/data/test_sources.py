"""Sources: what they read, and that every mistake is named with its remedy."""

import io
import json
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from stvit_jax.data.sources import open_source
from stvit_jax.data.sources.tfds import open_tfds
from stvit_jax.errors import UserError
from tests.mini_sets import picture, prepare


def change_info(version_dir: Path, **fields: object) -> None:
    path = version_dir / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def own_digits(digits_dir: Path, tmp_path: Path) -> Path:
    """A data directory with prepared digits that the test may spoil."""
    shutil.copytree(digits_dir, tmp_path / "data")
    return tmp_path / "data"


# --- tfds ---


def test_a_source_pickles_small(digits_dir: Path) -> None:
    source = open_source("tfds", "digits", str(digits_dir), train=True)
    pickled = pickle.dumps(source)
    assert len(pickled) < 10_000
    assert pickle.loads(pickled)[7] == source[7]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digts", ["'digts'", "did you mean digits"]),
        ("imagenet2013", ["imagenet2012"]),
        (
            "imagenet2012",
            [
                "not prepared in",
                "tfds.builder('imagenet2012'",
                "file_format='array_record'",
                "manual_dir=",
                "ILSVRC2012_img_train.tar",
                "ILSVRC2012_img_val.tar",
            ],
        ),
        ("imagenet2012_subset/10pct", ["manual_dir=", "ILSVRC2012_img_train.tar"]),
        ("cifar100", ["tfds.builder('cifar100'", "file_format='array_record'"]),
        ("cifar100/nope", ["'cifar100/nope' cannot be prepared", "BuilderConfig nope not found"]),
        ("cifar100:9.9.9", ["cannot be prepared", "only: 3.0.2"]),
        ("coco", ["'coco' has no ClassLabel feature 'label'"]),
        ("foo bar", ["'foo bar' cannot be opened", "correct data.name"]),
        ("", ["'' cannot be opened", "correct data.name"]),
    ],
)
def test_unknown_and_unprepared_sets(tmp_path: Path, name: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        open_source("tfds", name, str(tmp_path), train=True)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_the_prepare_command_is_valid_python(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        open_source("tfds", "imagenet2012", str(tmp_path), train=True)
    python, flag, program, *_ = shlex.split(str(error.value).split("with: ")[1])
    assert (python, flag) == ("python", "-c")
    compile(program.rstrip(","), "command", "exec")


def test_a_missing_data_dir(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.dir .*nowhere does not exist"):
        open_source("tfds", "cifar100", str(tmp_path / "nowhere"), train=True)


def test_tfrecord_gets_the_convert_command(own_digits: Path) -> None:
    own_digits = own_digits.rename(own_digits.with_name("a folder"))
    change_info(own_digits / "digits" / "1.0.0", fileFormat="tfrecord")
    command = f"python -m stvit_jax.data.array_record '{own_digits}/digits/1.0.0'"
    with pytest.raises(UserError, match="prepared as tfrecord") as error:
        open_source("tfds", "digits", str(own_digits), train=True)
    assert str(error.value).endswith(command)


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_damaged_metadata_is_named(own_digits: Path, file: str) -> None:
    (own_digits / "digits" / "1.0.0" / file).write_text("{")
    with pytest.raises(UserError, match="'digits' cannot be opened .*prepare the set again"):
        open_source("tfds", "digits", str(own_digits), train=True)


@pytest.mark.slow
def test_the_convert_command_converts(digits_dir: Path, tmp_path: Path) -> None:
    """Imports TensorFlow twice; on the real files of a set that tfds prepared as TFRecord."""
    program = (
        "from stvit_jax.data.digits import Digits; import sys; "
        "Digits(data_dir=sys.argv[1]).download_and_prepare(file_format='tfrecord')"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=300)
    with pytest.raises(UserError) as error:
        open_source("tfds", "digits", str(tmp_path), train=True)
    _, *arguments = shlex.split(str(error.value).split("with: ")[1])

    def convert() -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, timeout=300
        )

    (file,) = tmp_path.glob("digits/*/digits-train.tfrecord*")
    sound = file.read_bytes()
    file.write_bytes(sound[:5000] + bytes([sound[5000] ^ 4]) + sound[5001:])
    damaged = convert()
    assert damaged.returncode == 1
    assert damaged.stderr.splitlines()[-1].startswith(f"error: {file} is damaged, prepare the set")
    assert "Traceback" not in damaged.stderr
    file.write_bytes(sound)
    assert "has ArrayRecord files now" in convert().stdout
    assert "has ArrayRecord files already" in convert().stdout
    for train in (True, False):
        ours = open_source("tfds", "digits", str(tmp_path), train=train)
        expected = open_source("tfds", "digits", str(digits_dir), train=train)
        assert [ours[i] for i in range(len(ours))] == [expected[i] for i in range(len(expected))]


def test_a_record_is_found_in_its_file(tmp_path: Path) -> None:
    """Of several files, the count starts anew in each."""
    examples = [
        {"id": str(i), "image": picture(i, (32, 32), "PNG"), "label": 0, "coarse_label": 0}
        for i in range(40)
    ]
    prepare("cifar100", tmp_path, {"train": examples}, shards=3)
    source = open_source("tfds", "cifar100", str(tmp_path), train=True)
    places = [source.where(i).split(", record ") for i in range(len(source))]
    files = sorted({file for file, _ in places})
    assert len(files) == 3
    for file in files:
        records = ArrayRecordReader(file).read_all()
        indices = [i for i, place in enumerate(places) if place[0] == file]
        assert [int(places[i][1]) for i in indices] == list(range(len(records)))
        for index, record in zip(indices, records, strict=True):
            assert source[index]["image"] in record


def test_a_source_gives_all_features(tmp_path: Path) -> None:
    """Images encoded, names of all features that hold classes; a label only where there is one."""
    png = picture(0, (32, 32), "PNG")
    examples = [{"id": "a", "image": png, "label": 7, "coarse_label": 11}]
    prepare("cifar100", tmp_path, {"train": examples})
    source = open_tfds("cifar100", str(tmp_path), train=True)
    assert source[0] == {"id": b"a", "image": png, "label": 7, "coarse_label": 11}
    assert source.class_names == source.label_names["label"] and source.num_classes == 100
    assert len(source.label_names["coarse_label"]) == 20

    several = [{"image": png, "file_name": "b", "original_label": 3, "real_label": [3, 8]}]
    prepare("imagenet2012_real", tmp_path, {"validation": several})
    source = pickle.loads(pickle.dumps(open_tfds("imagenet2012_real", str(tmp_path), train=False)))
    assert source[0].keys() == {"image", "file_name", "original_label", "real_label"}
    assert source[0]["image"] == png and list(source[0]["real_label"]) == [3, 8]
    assert source.class_names == () and source.num_classes == 0
    names = source.label_names
    assert names.keys() == {"original_label", "real_label"}
    assert len(names["real_label"]) == 1000 and names["real_label"] == names["original_label"]
    with pytest.raises(UserError, match="'imagenet2012_real' has no ClassLabel feature 'real_la"):
        open_source("tfds", "imagenet2012_real", str(tmp_path), train=False)


def test_an_empty_split(own_digits: Path) -> None:
    info = own_digits / "digits" / "1.0.0"
    splits = json.loads((info / "dataset_info.json").read_text())["splits"]
    for split in splits:
        split["shardLengths"] = ["0"]
    change_info(info, splits=splits)
    with pytest.raises(UserError, match="the split test of tfds data set 'digits' .* is empty"):
        open_source("tfds", "digits", str(own_digits), train=False)


def test_a_set_without_class_labels(own_digits: Path) -> None:
    items = [{"featureKey": "image"}, {"featureKey": "image"}]
    change_info(own_digits / "digits" / "1.0.0", supervisedKeys={"tuple": {"items": items}})
    with pytest.raises(UserError, match="'digits' has no ClassLabel feature 'image'"):
        open_source("tfds", "digits", str(own_digits), train=True)


def test_a_set_without_the_split(own_digits: Path) -> None:
    info = own_digits / "digits" / "1.0.0"
    splits = json.loads((info / "dataset_info.json").read_text())["splits"]
    change_info(info, splits=[split for split in splits if split["name"] == "train"])
    with pytest.raises(UserError, match="no split validation or test"):
        open_source("tfds", "digits", str(own_digits), train=False)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named(own_digits: Path, damage: str) -> None:
    (path,) = (own_digits / "digits" / "1.0.0").glob("digits-train.array_record*")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        at = data.index(b"IDAT")
        data[at + 6] ^= 4
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()
    source = open_source("tfds", "digits", str(own_digits), train=True)
    with pytest.raises(UserError, match="digits-train.array_record.*is damaged"):
        for index in range(len(source)):
            source[index]


# --- class folders ---


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


# --- random pictures ---


def test_fake_pictures_are_jpegs_and_repeatable() -> None:
    source = open_source("fake", "", "", train=True)
    again = open_source("fake", "", "", train=False)
    assert (len(source), len(again), source.num_classes) == (1_281_167, 1000, 1000)
    assert source[999] == again[999]
    data = source[999]["image"]
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size) == ("JPEG", (500, 375))
    assert np.asarray(image).std() > 20
    assert data != source[998]["image"]


def test_an_unknown_source() -> None:
    with pytest.raises(UserError, match="'webdataset' is unknown: use 'tfds', 'folder' or 'fake'"):
        open_source("webdataset", "", "", train=True)
