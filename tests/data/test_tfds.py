"""Sets of tfds: what an example has, and damaged files."""

import json
import pickle
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordReader

from stvit_jax.data.sources import open_source
from stvit_jax.data.sources.tfds import open_tfds
from stvit_jax.errors import UserError
from tests.mini_sets import change_info, picture, prepare, prepare_own


def test_a_source_pickles_small(digits_dir: Path) -> None:
    source = open_source("tfds", "digits", str(digits_dir), train=True)
    pickled = pickle.dumps(source)
    assert len(pickled) < 10_000
    assert pickle.loads(pickled)[7] == source[7]


def test_a_record_is_found_in_its_file(tmp_path: Path) -> None:
    """Of several files, the count starts anew in each."""
    examples = [
        {"id": str(i), "image": picture(i, (32, 32), "PNG"), "label": 0, "coarse_label": 0}
        for i in range(40)
    ]
    prepare("cifar100", tmp_path, {"train": examples}, shards=3)
    source = open_tfds("cifar100", str(tmp_path), train=True)
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


def test_a_set_without_a_split_to_train_on(tmp_path: Path) -> None:
    prepare_own("mini_own", tmp_path, {"extra": [0, 1, 2], "test": [0]})
    with pytest.raises(
        UserError, match="'mini_own' has no split train; it has extra, test: choose"
    ):
        open_source("tfds", "mini_own", str(tmp_path), train=True)
    assert len(open_source("tfds", "mini_own", str(tmp_path), train=False)) == 1


@pytest.mark.parametrize("split", ["val", "valid", "dev"])
def test_other_names_of_a_split_to_evaluate_on(tmp_path: Path, split: str) -> None:
    prepare_own("mini_own", tmp_path, {"train": [0, 1, 2], split: [2]})
    source = open_source("tfds", "mini_own", str(tmp_path), train=False)
    assert len(source) == 1 and source[0]["label"] == 2


@pytest.mark.parametrize("count", [20, 23, 10, 9])
def test_a_tenth_is_held_out_of_a_set_with_train_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture, count: int
) -> None:
    prepare_own("mini_own", tmp_path, {"train": [i % 3 for i in range(count)], "extra": [0]})
    whole = open_tfds("mini_own", str(tmp_path), train=True)
    capsys.readouterr()
    train = open_source("tfds", "mini_own", str(tmp_path), train=True)
    assert capsys.readouterr().out == ""
    held_out = open_source("tfds", "mini_own", str(tmp_path), train=False)
    said = f"tenth record of train, {len(held_out)} of {count}, is held out"
    (line,) = capsys.readouterr().out.splitlines()
    assert said in line
    assert [held_out[i] for i in range(len(held_out))] == [whole[i] for i in range(0, count, 10)]
    assert [held_out.where(i) for i in range(len(held_out))] == [
        whole.where(i) for i in range(0, count, 10)
    ]
    others = [i for i in range(count) if i % 10]
    assert [train[i] for i in range(len(train))] == [whole[i] for i in others]
    assert train.where(len(train) - 1) == whole.where(others[-1])
    assert train.class_names == held_out.class_names == whole.class_names
    assert len(pickle.dumps(train)) < 10_000
    with pytest.raises(UserError, match="has no split to evaluate on .*; it has train, extra"):
        open_tfds("mini_own", str(tmp_path), train=False)


@pytest.mark.parametrize(("labels", "count"), [([-1] * 24, 24), ([0, 1, 2, -1], 1)])
def test_labels_that_are_no_classes(tmp_path: Path, labels: list[int], count: int) -> None:
    prepare_own("mini_own", tmp_path, {"train": [0, 1, 2], "test": labels})
    open_source("tfds", "mini_own", str(tmp_path), train=True)
    words = (
        f"{count} of the {len(labels)} labels looked at in the split test of tfds data set "
        rf"'mini_own' are none of its classes 0\.\.2 \(but {labels[-1]}\)"
    )
    with pytest.raises(UserError, match=words):
        open_source("tfds", "mini_own", str(tmp_path), train=False)


def test_labels_are_looked_at_all_over_a_split(tmp_path: Path) -> None:
    prepare_own("mini_own", tmp_path, {"train": [0] * 300, "test": [1] * 600 + [-1] * 10})
    with pytest.raises(UserError, match=r"of the 204 labels looked at in the split test"):
        open_source("tfds", "mini_own", str(tmp_path), train=False)


@pytest.mark.parametrize("damage", ["flip", "truncate", "cut to nothing", "another", "remove"])
def test_a_damaged_file_is_named(own_digits: Path, damage: str) -> None:
    (path,) = (own_digits / "digits" / "1.0.0").glob("digits-train.array_record*")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        at = data.index(b"IDAT")
        data[at + 6] ^= 4
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "cut to nothing":
        path.write_bytes(data[: 2**16])
    elif damage == "another":
        (other,) = path.parent.glob("digits-test.array_record*")
        path.write_bytes(other.read_bytes())
    else:
        path.unlink()
    words = "is missing: restore it or prepare" if damage == "remove" else "is damaged: restore"
    source = open_source("tfds", "digits", str(own_digits), train=True)
    with pytest.raises(UserError, match=f"digits-train.array_record.*{words}"):
        for index in range(len(source)):
            source[index]
