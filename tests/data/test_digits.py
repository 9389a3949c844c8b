"""The digits data set: its content, without TensorFlow, and prepared by two processes at once."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stvit_jax.data import digits
from stvit_jax.data.sources import open_source
from stvit_jax.errors import UserError
from tests.data.processes import run_script
from tests.program import WITHOUT_TENSORFLOW

ROOT = Path(__file__).parents[2]

READ_BOTH_SPLITS = """
import sys
from stvit_jax.data.sources import open_source
sizes = [len(open_source("tfds", "digits", sys.argv[1], train=train)) for train in (True, False)]
source = open_source("tfds", "digits", sys.argv[1], train=True)
assert source[0]["image"].startswith(b"\\x89PNG")
assert sys.modules.get("tensorflow") is None
print(sizes)
"""


def child(data_dir: Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", READ_BOTH_SPLITS, str(data_dir)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_splits_hold_the_digits_of_scikit_learn(digits_dir: Path) -> None:
    from sklearn.datasets import load_digits

    reference = load_digits()
    expected = sorted(
        (np.rint(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(reference.images, reference.target, strict=True)
    )
    train = open_source("tfds", "digits", str(digits_dir), train=True)
    test = open_source("tfds", "digits", str(digits_dir), train=False)
    assert (len(train), len(test)) == (1437, 360)
    assert train.class_names == tuple("0123456789") and train.num_classes == 10

    found = []
    for source in (train, test):
        for index in range(len(source)):
            image = Image.open(io.BytesIO(source[index]["image"]))
            found.append((np.asarray(image).tobytes(), source[index]["label"]))
    assert sorted(found) == expected

    held_out = np.bincount([label for _, label in found[1437:]])
    np.testing.assert_allclose(held_out, np.bincount(reference.target) / 5, atol=1)


def test_prepares_without_tensorflow_and_by_two_at_once(tmp_path: Path) -> None:
    processes = [child(tmp_path / "new", **WITHOUT_TENSORFLOW) for _ in range(2)]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert errors == ""
        written, sizes = output.splitlines()
        assert written.startswith("Writing the digits data set")
        assert sizes == "[1437, 360]"
    again = child(tmp_path / "new", **WITHOUT_TENSORFLOW)
    assert again.communicate(timeout=120) == ("[1437, 360]\n", "")
    assert [path.name for path in (tmp_path / "new" / "digits").iterdir()] == ["1.0.0"]


def test_tensorflow_is_not_imported_where_it_could_be(digits_dir: Path) -> None:
    assert child(digits_dir).communicate(timeout=120) == ("[1437, 360]\n", "")


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/digits.*set data\.dir"):
        digits.prepare(str(tmp_path / "file"))


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    program = """
import resource, sys
from stvit_jax.data import digits
from stvit_jax.errors import UserError

resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
try:
    digits.prepare(sys.argv[1])
except UserError as error:
    print(error)
"""
    done = run_script(program, tmp_path, tmp_path / "data")
    line = done.stdout.splitlines()[-1]
    assert line.startswith(f"cannot write the digits data set to {tmp_path}/data"), done.stderr
    assert "File too large" in line and "set data.dir" in line
