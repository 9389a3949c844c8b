"""Finding a prepared set, and what is said where there is none."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from stvit_jax.data.sources import open_source
from stvit_jax.errors import UserError
from tests.data.processes import run_script, without_privileges
from tests.mini_sets import change_info, picture, prepare_own


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
        ("foo bar", ["'foo bar' is not a tfds data set", "correct data.name"]),
        ("", ["data.name is empty", "imagenet2012", "data.source=folder"]),
        ("imagenet-1k", ["'imagenet-1k' is not a tfds data set", "did you mean imagenet2012?"]),
        ("ImageNet", ["did you mean imagenet2012?"]),
        ("CIFAR10", ["did you mean cifar10?"]),
        ("zh-plus/tiny-imagenet", ["'zh-plus/tiny-imagenet' is not a tfds data set"]),
        ("/data/imagenet", ["'/data/imagenet' is a path", "data.dir", "data.source=folder"]),
        ("./imagenet", ["'./imagenet' is a path"]),
        ("cifar10/train[:90%]", ["a part of a set", "data.name=cifar10;"]),
        ("cifar10[train]", ["a part of a set", "data.name=cifar10;"]),
        ("cifar10/test", ["a part of a set", "data.name=cifar10;"]),
        ("train+test", ["a part of a set"]),
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


def refusal(name: str, data_dir: Path) -> str:
    """What the error says."""
    with pytest.raises(UserError) as error:
        open_source("tfds", name, str(data_dir), train=True)
    return str(error.value)


def test_a_data_dir_that_is_none(tmp_path: Path) -> None:
    assert f"data.dir {tmp_path}/nowhere does not exist" in refusal("cifar10", tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert f"data.dir {tmp_path}/file is a file" in refusal("cifar10", tmp_path / "file")
    (tmp_path / "set" / "train" / "apple").mkdir(parents=True)
    assert "set data.source=folder" in refusal("imagenet2012", tmp_path / "set")


def test_a_data_dir_above_or_below(tmp_path: Path) -> None:
    version = prepare_own("mini_own", tmp_path / "tfds", {"train": [0, 1, 2], "test": [0]})
    for inside in (version, version.parent):
        assert f"set data.dir={tmp_path}/tfds" in refusal("mini_own", inside)
    assert f"set data.dir={tmp_path}/tfds" in refusal("mini_own", tmp_path)
    there = refusal("mine", tmp_path / "tfds")
    assert "not prepared in" in there and "(there: mini_own)" in there
    assert "did you mean mini_own?" in refusal("mini_one", tmp_path / "tfds")
    for variant in ("mini_own:2.0.0", "mini_own/large"):
        assert "mini_own, which has 1.0.0: correct data.name" in refusal(variant, tmp_path / "tfds")


def test_an_unfinished_preparation(tmp_path: Path) -> None:
    version = prepare_own("mini_own", tmp_path, {"train": [0, 1, 2], "test": [0]})
    (version / "dataset_info.json").unlink()
    assert "cannot be opened" in refusal("mini_own", tmp_path)
    change = {"name": "mini_own", "version": "1.0.0"}  # as before the first split is written
    (version / "dataset_info.json").write_text(json.dumps(change))
    words = "1.0.0 holds no finished preparation of tfds data set 'mini_own'"
    assert words in refusal("mini_own", tmp_path)
    version.rename(version.with_name("incomplete.ABC_1.0.0"))
    assert "(folders there: incomplete.ABC_1.0.0)" in refusal("mini_own", tmp_path)
    # The features are what makes a folder a set.
    (tmp_path / "cifar10" / "incomplete.ABC_3.0.2").mkdir(parents=True)
    assert "prepare it once with: python -c" in refusal("cifar10", tmp_path)


@pytest.mark.parametrize("denied", ["", "mini_own", "mini_own/1.0.0"])
def test_a_folder_that_may_not_be_read(tmp_path: Path, denied: str) -> None:
    prepare_own("mini_own", tmp_path / "tfds", {"train": [0, 1, 2], "test": [0]})
    program = """
import sys
from stvit_jax.data.sources import open_source
from stvit_jax.errors import UserError

try:
    open_source("tfds", "mini_own", sys.argv[1], train=True)
except UserError as error:
    print("UserError", error)
"""
    data_dir = tmp_path / "tfds"
    (data_dir / denied).chmod(0)
    try:
        done = run_script(program, tmp_path, data_dir, before=without_privileges())
    finally:
        (data_dir / denied).chmod(0o755)
    assert done.stdout.startswith("UserError ") and "Permission denied" in done.stdout, done.stderr
    assert str(data_dir / denied) in done.stdout


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


CONVERT = """
import sys
from pathlib import Path

from stvit_jax.data import array_record
from tests.mini_sets import prepare_own

splits = {"train": [0, 1, 2, 1], "test": [2, 0]}
version = prepare_own("mini_own", Path(sys.argv[1]), splits, file_format="tfrecord")
array_record.main([str(version)])
"""


@pytest.mark.docs  # imports TensorFlow
def test_tfrecord_becomes_array_record(tmp_path: Path) -> None:
    done = run_script(CONVERT, tmp_path, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/mini_own/1.0.0 has ArrayRecord files now" in done.stdout
    for train, labels in ((True, [0, 1, 2, 1]), (False, [2, 0])):
        found = list(open_source("tfds", "mini_own", str(tmp_path), train=train))
        expected = {(picture(i, (8, 8), "PNG"), label) for i, label in enumerate(labels)}
        assert {(example["image"], example["label"]) for example in found} == expected
        assert len(found) == len(expected)


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
    file.rename(file.with_name("gone"))
    assert f"error: {file} cannot be read (" in convert().stderr
    file.with_name("gone").rename(file)
    assert "has ArrayRecord files now" in convert().stdout
    assert "has ArrayRecord files already" in convert().stdout
    for train in (True, False):
        ours = open_source("tfds", "digits", str(tmp_path), train=train)
        expected = open_source("tfds", "digits", str(digits_dir), train=train)
        assert [ours[i] for i in range(len(ours))] == [expected[i] for i in range(len(expected))]
