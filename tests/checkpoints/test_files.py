"""Where weights may be written, and what is left where that fails; where they are looked for."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from stvit_jax.checkpoints import weights
from stvit_jax.errors import UserError
from stvit_jax.models.settings import abstract, create
from tests.privileges import unprivileged

ROOT = Path(__file__).parents[2]


def made() -> weights.Weights:
    """A network as small as they come."""
    settings = {"name": "stvit_small", "embed_dim": [8], "depths": [1], "num_heads": [1]}
    settings |= {"n_iter": [1], "stoken_size": [1], "layerscale": [False], "projection": 8}
    settings |= {"num_classes": 3, "mlp_ratio": 1, "qkv_bias": True, "in_chans": 3}
    variables = abstract(create(settings))
    rng = np.random.default_rng(0)

    def leaf(x):
        return rng.uniform(1, 2, x.shape).astype(x.dtype) if x.ndim else np.zeros((), np.int64)

    return weights.Weights(jax.tree.map(leaf, variables), settings, Path("made"), {})


@pytest.mark.parametrize(
    "name, form",
    [
        *((f"w{suffix}", "torch") for suffix in (".pth", ".pt", ".bin", ".ckpt", ".pth.tar")),
        *((f"w{suffix}", "torch") for suffix in (".PTH", ".v1.Pt")),
        *((f"w{suffix}", "safetensors") for suffix in (".safetensors", ".SafeTensors")),
        *((name, "directory") for name in ("w", "v1.0", "w.pth/", "deep/er/w", ".w")),
    ],
)
def test_the_name_tells_the_form(name, form, tmp_path):
    path = f"{tmp_path}/{name}"
    weights.write(path, made())
    begins = {"torch": b"PK\x03\x04", "safetensors": None, "directory": None}[form]
    assert Path(path).is_dir() == (form == "directory")
    if begins:
        assert Path(path).read_bytes().startswith(begins)
    if form == "safetensors":
        safetensors.numpy.load_file(path)
    assert weights.read(path).settings == made().settings


def test_the_same_weights_are_the_same_bytes(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        weights.write(tmp_path / name, made())
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(
    "name",
    ["w.npz", "w.onnx", "w.h5", "w.msgpack", "w.zip", "w.tar", "w.pth.gz", "w.json", "w.PKL"],
)
def test_other_forms_are_refused_with_those_that_are_written(name, tmp_path):
    with pytest.raises(UserError, match="is not written; end it in .safetensors or .pth, .pt, "):
        weights.write(tmp_path / name, made())
    assert list(tmp_path.iterdir()) == []


def test_addresses_and_homes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for address in ("gs://", "https://x.org/w.pth", Path("s3://b/w.pth")):
        for attempt in (weights.read, lambda path: weights.write(path, made())):
            with pytest.raises(UserError, match="is an address, but none of gs://BUCKET/DIR"):
                attempt(address)
    with pytest.raises(UserError, match="an empty text names no file"):
        weights.read("")
    with pytest.raises(UserError, match="is neither a directory that convert_torch_weights.py"):
        weights.read(".")
    with pytest.raises(UserError, match="there is no such home directory"):
        weights.read("~nobody-of-that-name/w")
    assert list(tmp_path.iterdir()) == []
    weights.write("~/w.safetensors", made())
    assert weights.read("~/w.safetensors").source == tmp_path / "w.safetensors"


def test_what_is_there_is_never_followed_or_replaced(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "w.pth.tmp").symlink_to(tmp_path / "victim")
    (tmp_path / "dangling.pth").symlink_to(tmp_path / "absent")
    weights.write(tmp_path / "w.pth", made())
    assert (tmp_path / "victim").read_text() == "mine" and not (tmp_path / "w.pth").is_symlink()
    umask = os.umask(0o022)
    os.umask(umask)
    assert (tmp_path / "w.pth").stat().st_mode & 0o777 == 0o666 & ~umask
    for name in ("victim", "dangling.pth"):
        with pytest.raises(UserError, match="exists; remove it, or choose another output"):
            weights.write(tmp_path / name, made())
    assert not (tmp_path / "absent").exists()


def write_three_forms(folder: str, limit: str) -> None:
    """Prints what is wrong with each."""
    weights_made = made()
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    for name in ("w.pth", "w.safetensors", "w"):
        try:
            weights.write(f"{folder}/{name}", weights_made)
        except UserError as error:
            print(error)


@pytest.mark.parametrize("trouble", ["Permission denied", "File too large", "Not a directory"])
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(trouble, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    if trouble == "Permission denied":
        folder.chmod(0o555)
    if trouble == "Not a directory":
        folder = folder / "file"
        folder.touch()
    command = [__file__, str(folder), "3000" if trouble == "File too large" else ""]
    result = subprocess.run(
        unprivileged(sys.executable, *command),
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"{folder}/{name} cannot be written: {trouble}" for name in ("w.pth", "w.safetensors", "w")
    ]
    assert sum(1 for path in tmp_path.rglob("*") if path.name not in ("folder", "file")) == 0


@pytest.mark.parametrize("form", ["w.pth", "w.safetensors", "w"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value, form, tmp_path):
    broken = made()
    broken.variables["params"]["head"]["kernel"][0, 0] = value
    weights.write(tmp_path / form, broken)
    with pytest.raises(UserError, match="w.* holds weights that are not finite, in params/head/k"):
        weights.read(tmp_path / form)


def test_pipes_and_devices_in_directories_are_not_read(tmp_path):
    weights.write(tmp_path / "w", made())
    metadata = tmp_path / "w" / "meta" / "metadata"
    metadata.unlink()
    metadata.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="meta/metadata is no file and no directory"):
        weights.read(tmp_path / "w")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    os.mkfifo(tmp_path / "run" / "config.json")
    with pytest.raises(UserError, match="config.json is a pipe, and no file"):
        weights.read(tmp_path / "run")


def test_metadata_that_is_no_json_is_one_line(tmp_path):
    weights.write(tmp_path / "w.safetensors", made())
    content = (tmp_path / "w.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for text in ("{", "[" * 100_000, "NaN]"):
        header["__metadata__"]["stvit_config"] = text
        new = json.dumps(header).encode()
        (tmp_path / "w.safetensors").write_bytes(
            len(new).to_bytes(8, "little") + new + content[8 + size :]
        )
        with pytest.raises(UserError, match="is damaged: its stvit_config is no JSON"):
            weights.read(tmp_path / "w.safetensors")


if __name__ == "__main__":
    write_three_forms(*sys.argv[1:])
