"""Weights out of the workdirs of runs, and the class names that go with them."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from stvit_jax.checkpoints import digests, fit, weights
from stvit_jax.errors import UserError
from stvit_jax.models.settings import complete
from tests.checkpoints.networks import assert_bits_equal


def rewrite_meta(checkpoint: Path, **changes) -> None:
    """Changes what a checkpoint says of itself, with the checksum that belongs to it."""
    file = checkpoint / "meta/metadata"
    meta = json.loads(file.read_text()) | changes
    del meta["checksum"]
    meta["checksum"] = digests._checksum(meta)
    file.write_text(json.dumps(meta))


def test_class_names_of_a_run(workdir, tiny, tmp_path):
    names = tuple(f"class {i}" for i in range(9)) + ("café",)
    path = workdir(3)
    assert weights.read(path).classes is None  # a run from before they were kept
    (path / "classes.json").write_text(json.dumps(names))
    weights.write(tmp_path / "w.pth", fit.identify(weights.read(path)))
    last = weights.read(tmp_path / "w.pth")
    assert (last.classes, last.settings, last.step) == (names, tiny.settings, None)


def test_workdir_of_a_run(workdir, tiny, capsys):
    workdir(3)
    path = workdir(5)
    for ema, by in ((False, np.float32(5)), (True, np.float32(5.5))):
        found = weights.read(path, ema)
        assert found.source == path / "checkpoints/5"
        assert complete(found.variables, found.settings) == tiny.settings
        expected = jax.tree.map(lambda x, by=by: x + by if x.ndim else x, tiny.variables)
        assert_bits_equal(found.variables, expected)

    # A damaged one is passed over and left alone: values that are not the saved ones, ...
    sound = json.loads((path / "checkpoints/5/meta/metadata").read_text())
    wrong = sound["digests"] | {"params/head/bias": "0123456789abcdef"}
    rewrite_meta(path / "checkpoints/5", digests=wrong)
    assert weights.read(path).source.name == "3"
    said = capsys.readouterr().err
    assert "checkpoints/5 is damaged: the digest of params/head/bias is not the" in said
    assert weights.read(path, ema=True).source.name == "5"
    rewrite_meta(path / "checkpoints/5", digests=sound["digests"])

    # ... files that cannot be decoded.
    for file in (path / "checkpoints/5/state/d").iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    before = sorted(path.rglob("*"))
    assert weights.read(path).source.name == "3"
    said = capsys.readouterr().err
    assert "checkpoints/5 is damaged" in said and said.count("\n") == 1
    assert sorted(path.rglob("*")) == before


def test_workdirs_are_read_as_strictly_as_on_resume(workdir, capsys):
    workdir(3)
    path = workdir(5)
    assert weights.read(path).step == 5
    (path / "checkpoints/5").rename(path / "checkpoints/7")
    assert weights.read(path).step == 3
    assert "checkpoints/7 is damaged: it holds the state of batch 5" in capsys.readouterr().err
    rewrite_meta(path / "checkpoints/7", position=7, format=99)
    with pytest.raises(UserError, match="7 has format 99, this program reads 1; use the version"):
        weights.read(path)


def test_workdir_without_what_is_asked_for(workdir, tmp_path):
    path = workdir(3, ema=False)
    with pytest.raises(UserError, match="no moving average; leave .*--config.ema_decay=0"):
        weights.read(path, ema=True)
    (path / "checkpoints/3").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no sound checkpoint"):
        weights.read(path)
    (path / "config.json").unlink()
    with pytest.raises(UserError, match="config.json cannot be read"):
        weights.read(path)


def test_one_checkpoint_of_a_run(workdir, capsys):
    workdir(3)
    path = workdir(5)
    for given, step in {"checkpoints/3": 3, "checkpoints/5": 5, "checkpoints": 5}.items():
        found = weights.read(path / given)
        assert (found.step, found.source) == (step, path / f"checkpoints/{step}")
    (path / "checkpoints/5/meta/metadata").write_text("")
    with pytest.raises(UserError, match="5 is damaged: .*; give .*/run, and the newest"):
        weights.read(path / "checkpoints/5")
    assert weights.read(path / "checkpoints").step == 3
    assert weights.read(path).step == 3


@pytest.mark.parametrize("text", ["", "[]", '{"model": 3}', '{"model": {}}', "[" * 100_000, "\xff"])
def test_a_config_that_is_none_is_one_line(text, workdir):
    path = workdir(3)
    (path / "config.json").write_text(text)
    if text == '{"model": {}}':
        with pytest.raises(UserError, match="do not name the variant"):
            fit.identify(weights.read(path))
        return
    with pytest.raises(UserError, match="config.json .*cannot be read") as caught:
        weights.read(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000])
def test_class_names_that_cannot_be_read_are_one_line(text, workdir):
    path = workdir(3)
    (path / "classes.json").write_text(text)
    with pytest.raises(UserError, match="classes.json is damaged, it cannot be read") as caught:
        weights.read(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
