"""Weights of a hub out of its cache, laid out as huggingface_hub does, without a network."""

import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from PIL import Image

import stvit_jax
from stvit_jax.checkpoints import hub
from stvit_jax.errors import UserError

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).parents[2]
COMMIT, OLDER = "a" * 40, "b" * 40
# Nothing listens there: a network that is not to be reached.
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
OFFLINE = {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def home(random_variables, tmp_path_factory) -> Path:
    """HF_HOME with two commits of one repository, and a pickle alone in another."""
    home = tmp_path_factory.mktemp("hf")
    model = stvit_jax.create_model("stvit_tiny", depths=(1, 1, 1, 1))
    for commit, classes in ((COMMIT, "new"), (OLDER, "old")):
        names = [f"{classes} {i}" for i in range(10)]
        folder = home / "made"
        stvit_jax.save_pretrained(folder, model, random_variables(model), classes=names)
        for file in folder.iterdir():
            hold(home, "owner/net", commit, file.name, file.read_bytes())
        shutil.rmtree(folder)
    refs(home, "owner/net", {"main": COMMIT, "v1": OLDER})
    hold(home, "owner/pickled", COMMIT, "pytorch_model.bin", pickle.dumps({}))
    hold(home, "owner/disguised", COMMIT, "model.safetensors", b"PK\x03\x04" + b"0" * 99)
    for name in ("owner/pickled", "owner/disguised"):
        refs(home, name, {"main": COMMIT})
    return home


def hold(home: Path, repository: str, commit: str, name: str, content: bytes) -> None:
    root = home / "hub" / f"models--{repository.replace('/', '--')}"
    blob = root / "blobs" / f"{commit[:8]}{name}"
    link = root / "snapshots" / commit / name
    for path in (blob, link):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link.symlink_to(os.path.relpath(blob, link.parent))


def refs(home: Path, repository: str, names: dict[str, str]) -> None:
    for name, commit in names.items():
        path = home / "hub" / f"models--{repository.replace('/', '--')}" / "refs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)


def run(home: Path, network: dict[str, str], *addresses: str) -> list[str]:
    """What a program that reads them says, a line each; quickly."""
    code = """
import sys
from stvit_jax import UserError
from stvit_jax.checkpoints import weights
for address in sys.argv[1:]:
    try:
        found = weights.read(address)
        depths, commit = found.settings["depths"], found.source.parent.name
        print(depths, found.classes[0], found.image_size, commit)
    except UserError as error:
        print("UserError:", error)
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(home), "JAX_PLATFORMS": "cpu"} | network
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *addresses],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 60
    lines = done.stdout.splitlines()
    assert len(lines) == len(addresses)
    return lines


@pytest.mark.docs
def test_the_cache_serves_where_no_hub_is_reached(home):
    found, missing = run(home, NOWHERE, "hf_hub:owner/net", "hf_hub:owner/none")
    assert found == f"[1, 1, 1, 1] new 0 224 {COMMIT}"
    assert "the hub cannot be reached, and the cache in" in missing


def test_the_cache_serves_offline(home):
    names = ("net", "net@v1", f"net@{OLDER}", "net@v2", "none", "pickled", "disguised")
    said = run(home, OFFLINE, *(f"hf_hub:owner/{name}" for name in names))
    old = f"[1, 1, 1, 1] old 0 224 {OLDER}"
    assert said[:3] == [f"[1, 1, 1, 1] new 0 224 {COMMIT}", old, old]
    for line in said[3:6]:
        assert "the hub cannot be reached, and the cache in" in line
        assert "holds no model.safetensors of it" in line
    assert "is no safetensors file, and nothing else is read from a hub" in said[6]


@pytest.mark.parametrize(
    "address",
    ["hf_hub:", "hf_hub:net", "hf_hub:a/b/c", "hf_hub:../x", "hf_hub:a/b@", "hf_hub:a/ b"],
)
def test_a_malformed_address_says_how_it_is_written(address):
    with pytest.raises(UserError, match=r"is no address of a hub: write hf_hub:OWNER/NAME"):
        hub.fetched(address)


def test_the_command_of_conversion_takes_an_address(home, tmp_path):
    path = tmp_path / "w"
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "convert_torch_weights.py", "hf_hub:owner/net", "--output", path],
        cwd=ROOT, env=env | OFFLINE | {"HF_HOME": str(home)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model, variables = stvit_jax.from_pretrained(path)
    assert model.depths == (1, 1, 1, 1) and jax.tree.leaves(variables)


@pytest.mark.slow
def test_a_network_of_a_hub_is_made_and_predicts(home, tmp_path):
    """In a program of its own: huggingface_hub reads its variables when it is imported."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    code = """
import sys
import stvit_jax
from stvit_jax import predict
model, variables = stvit_jax.from_pretrained("hf_hub:owner/net@v1", num_classes=0)
print(model.depths, sorted(variables), "head" in variables["params"])
predict.main(["--weights", "hf_hub:owner/net@v1", "--image-size", "32", sys.argv[1]])
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.png"],
        cwd=ROOT, env=env | OFFLINE | {"HF_HOME": str(home)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "(1, 1, 1, 1) ['batch_stats', 'params'] False" in done.stdout
    assert "%  old " in done.stdout
