"""Records of more files than may be open, and files that the system does not give out."""

import os
from pathlib import Path

import pytest

from stvit_jax.data import records
from stvit_jax.data.sources.tfds import open_tfds
from stvit_jax.errors import UserError
from tests.data.processes import run_script
from tests.mini_sets import prepare_own

SHARDS, IMAGES, OPEN_FILES = 500, 600, 400


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with a set of SHARDS files."""
    path = tmp_path_factory.mktemp("shards")
    splits = {"train": [i % 3 for i in range(IMAGES)], "test": [i % 3 for i in range(IMAGES)]}
    prepare_own("mini_shards", path, splits, shards=SHARDS)
    return path


MANY_FILES = """
import resource, sys

import numpy as np
from stvit_jax.data import loader
from stvit_jax.data.order import Order
from stvit_jax.data.sources import open_source
from tests.data.labelled import examples

if __name__ == "__main__":
    workers, limit = map(int, sys.argv[2:])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit // 2, limit))
    train, test = (
        examples(open_source("tfds", "mini_shards", sys.argv[1], train=x)) for x in (True, False)
    )
    batches = loader.train_batches(train, Order(600, 60, repeats=1), workers=workers)
    loader.IN_PROCESS_EXAMPLES = 0
    for epoch in range(2):
        labels = np.concatenate([next(batches)["label"] for _ in range(10)])
        assert np.bincount(labels).tolist() == [200, 200, 200]
        counts = [b["mask"].sum() for b in loader.eval_batches(test, batch_size=64)]
        assert sum(counts) == 600
    batches.close()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == limit
    print("done")
"""


@pytest.mark.parametrize("workers", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_more_files_than_may_be_open(shards: Path, tmp_path: Path, workers: int) -> None:
    done = run_script(MANY_FILES, tmp_path, shards, workers, OPEN_FILES)
    assert done.stdout == "done\n", done.stderr


NO_MORE_FILES = """
import os, resource, sys

from stvit_jax.data.sources.tfds import open_tfds
from stvit_jax.errors import UserError

source = open_tfds("mini_shards", sys.argv[1], train=True)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
held = []
try:
    while True:
        held.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
try:
    source[0]
except UserError as error:
    print(error)
os.close(held.pop())
assert source[0]["label"] in (0, 1, 2)
"""


def test_too_many_open_files_are_not_called_damage(shards: Path, tmp_path: Path) -> None:
    done = run_script(NO_MORE_FILES, tmp_path, shards)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(
        "cannot be read (Too many open files): allow more open files (ulimit -n)\n"
    )


@pytest.mark.parametrize(
    ("instead", "words"),
    [
        ("nothing", "is missing: restore it or prepare the data set again"),
        ("loop", "levels of symbolic links): the link leads back to itself, remove it"),
        ("folder", "cannot be read (Is a directory): restore it"),
    ],
)
def test_what_the_system_says_is_told_from_damage(tmp_path: Path, instead: str, words: str) -> None:
    version = prepare_own("mini_own", tmp_path, {"train": [0] * 6, "test": [0] * 2}, shards=2)
    source = open_tfds("mini_own", str(tmp_path), train=True)
    path = version / "mini_own-train.array_record-00001-of-00002"
    assert [source[i]["label"] for i in range(6)] == [0] * 6
    path.unlink()
    assert source[5]["label"] == 0  # it is open
    source = open_tfds("mini_own", str(tmp_path), train=True)
    if instead == "loop":
        path.symlink_to(path.name)
    elif instead == "folder":
        os.mkdir(path)
    records._READERS.clear()
    assert source[0]["label"] == 0
    with pytest.raises(UserError) as error:
        source[5]
    assert str(error.value).startswith(str(path)) and words in str(error.value)
