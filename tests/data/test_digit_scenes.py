"""Scenes of digits: what they show, that they are always the same, and written by three at once."""

import threading
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest

from stvit_jax.data import digit_scenes, digits
from stvit_jax.data.annotations import IGNORED
from stvit_jax.data.scenes import test_scene
from stvit_jax.data.sources.scenes import open_scenes
from stvit_jax.errors import UserError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tfds") / "new"
    assert digit_scenes.prepare(str(path)) == path / "digit_scenes" / digit_scenes.VERSION
    return path


def test_several_write_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digit_scenes, "SCENES", {"training": 8, "validation": 2})
    barrier = threading.Barrier(3)
    rename = Path.rename

    def together(self: Path, target: Path) -> Path:
        barrier.wait(60)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", together)
    with ThreadPool(3) as pool:
        (target,) = set(pool.map(digit_scenes.prepare, [str(tmp_path)] * 3, chunksize=1))
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert len([*target.rglob("*.png")]) == 20
    assert target.stat().st_mode == target.parent.stat().st_mode  # others may read it


def test_a_set_in_the_layout(data_dir: Path, capsys: pytest.CaptureFixture) -> None:
    train = open_scenes("digit_scenes", str(data_dir), train=True)
    val = open_scenes("digit_scenes", str(data_dir), train=False)
    assert capsys.readouterr().out == ""  # written once
    assert [path.name for path in (data_dir / "digit_scenes").iterdir()] == [digit_scenes.VERSION]
    assert (len(train), len(val)) == (2400, 150)
    assert train.class_names == ("background", *"0123456789")
    counts = np.zeros(256, int)
    bright = []
    for index in range(len(val)):
        out = test_scene(**val[index], classes=11, long=64, short=64)
        image, label = out["image_0"], out["label"]
        assert image.shape == (64, 64, 3) and label.shape == (64, 64)
        counts += np.bincount(label.ravel(), minlength=256)
        digit = (label > 0) & (label != IGNORED)
        bright.append(image[digit].max(-1).mean() - image[label == 0].max(-1).mean())
        # The ground never touches a digit: what lies between is ignored.
        for one, other in ((digit[1:], label[:-1] == 0), (digit[:, 1:], label[:, :-1] == 0)):
            assert not (one & other).any()
    assert set(np.flatnonzero(counts)) == {*range(11), IGNORED}
    assert counts[1:11].min() > 0.5 * counts[1:11].max() and counts[IGNORED] < 0.1 * counts.sum()
    assert min(bright) > 60


def test_scenes_are_determined_and_held_out_digits_are_those_of_the_digits(data_dir: Path) -> None:
    from sklearn.datasets import load_digits

    every = load_digits()
    parts = digits.split(every.target)
    assert [len(part) for part in parts] == [1437, 360] and not set(parts[0]) & set(parts[1])
    for number, part in enumerate(parts):
        rng = np.random.Generator(np.random.Philox(key=[number, 7]))
        image, annotation = digit_scenes.compose(every.images[part], every.target[part], rng)
        source = open_scenes("digit_scenes", str(data_dir), train=number == 0)
        out = test_scene(**source[7], classes=11, long=64, short=64)
        np.testing.assert_array_equal(out["image_0"], image)
        np.testing.assert_array_equal(out["label"], annotation - np.uint8(1))


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/digit_scenes.*set data\.dir"):
        digit_scenes.prepare(str(tmp_path / "file"))
