"""`convert_torch_weights.py`: what it takes, says, writes and refuses."""

import argparse
import dataclasses
import hashlib
import json
import re
from collections import OrderedDict
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch

import convert_torch_weights
from benchmarks import torch_stvit
from stvit_jax.checkpoints import fit, weights
from stvit_jax.errors import UserError
from stvit_jax.models.settings import abstract, create


@pytest.fixture(scope="module")
def states(golden_state) -> dict[str, OrderedDict]:
    """Raw weights and moving average of stvit_small, float32."""
    raw = OrderedDict(
        (name, torch.from_numpy(x.astype(np.float32) if x.ndim else x))
        for name, x in golden_state("stvit_small").items()
    )
    average = OrderedDict((k, x if "fold" in k else x + 1) for k, x in raw.items())
    return {"model": raw, "model_ema": average}


@pytest.fixture(scope="module")
def published(states, tmp_path_factory) -> Path:
    """A training checkpoint as the published script writes it."""
    path = tmp_path_factory.mktemp("published") / "stvit-small-224.pth"
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    rest = {
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [5e-4], "metric": None},
        "scaler": {"scale": 65536.0, "growth_interval": 2000},
        "epoch": 299,
        "max_accuracy": np.float64(83.6),
        "args": argparse.Namespace(model="stvit_small", lr=5e-4, seed=np.int64(0)),
    }
    torch.save(states | rest, path)
    return path


def run(capsys, *args) -> str:
    code = convert_torch_weights.main([str(arg) for arg in args])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return captured.out


def refused(capsys, *args) -> str:
    with pytest.raises(UserError) as caught:
        convert_torch_weights.main([str(arg) for arg in args])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_holds(path: Path, state: OrderedDict) -> None:
    """The file loads strictly into the published network, equal to `state` in every bit."""
    back = torch.load(path, weights_only=True)
    assert list(back["model"]) == list(state)
    for name, tensor in state.items():
        assert back["model"][name].dtype == tensor.dtype
        assert torch.equal(back["model"][name], tensor), name
    assert back["stvit_config"]["name"] == "stvit_small"
    assert back["stvit_config"]["num_heads"] == [1, 2, 5, 8]
    torch_stvit.create_model("stvit_small").load_state_dict(back["model"], strict=True)


def test_a_published_checkpoint_through_every_form_and_back(published, states, tmp_path, capsys):
    said = run(capsys, published, "--output", tmp_path / "orbax")
    assert f"sha256   {sha256(published)}" in said
    assert "stvit_small, 1000 classes, 25,495,624 parameters, raw weights" in said
    rest = ("optimizer", "lr_scheduler", "scaler", "epoch", "max_accuracy", "args")
    for entry in ("model_ema", *rest):
        assert len(re.findall(rf"ignored  {entry}: \w+", said)) == 1
    assert "40 constant kernels, checked" in said
    assert re.search(r"output .*/orbax\n  sha256   [0-9a-f]{64}\n", said)

    said = run(capsys, tmp_path / "orbax", "--output", tmp_path / "w.safetensors")
    assert f"sha256   {sha256(tmp_path / 'w.safetensors')}" in said
    assert "ignored" not in said
    run(capsys, tmp_path / "w.safetensors", "--output", tmp_path / "w.pth")
    assert_holds(tmp_path / "w.pth", states["model"])


def test_the_moving_average_of_a_published_checkpoint(published, states, tmp_path, capsys):
    said = run(capsys, published, "--output", tmp_path / "w.pth", "--ema")
    assert "moving average" in said
    assert "ignored  model: the raw weights" in said
    assert_holds(tmp_path / "w.pth", states["model_ema"])


def test_a_bare_state_dict_and_names_with_module(states, tmp_path, capsys):
    prefixed = OrderedDict((f"module.{name}", x) for name, x in states["model"].items())
    torch.save(prefixed, tmp_path / "in.pth")
    run(capsys, tmp_path / "in.pth", "--output", tmp_path / "out.pth")
    assert_holds(tmp_path / "out.pth", states["model"])


def test_a_backbone_of_a_compiled_network_with_a_device_beside_it(states, tmp_path, capsys):
    """Nothing is lost without a word: what was taken off, set to zero, ignored, initialised."""
    held = {
        f"module._orig_mod.{name}": x
        for name, x in states["model"].items()
        if not name.startswith("head.") and not name.endswith("num_batches_tracked")
    }
    rest = {f"entry {i}": i for i in range(60)} | {"device": torch.device("cpu")}
    torch.save({"state_dict": held} | rest, tmp_path / "in.pth.tar")
    said = run(capsys, tmp_path / "in.pth.tar", "--output", tmp_path / "out.pt")
    assert "  note     taken off the names: module._orig_mod.\n" in said
    assert "  note     28 num_batches_tracked are missing: taken for 0\n" in said
    assert "  note     head is not in it: initialised anew, to be trained\n" in said
    assert said.count("  ignored  entry ") == 50 and "  ignored  12 entries more\n" in said
    back = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    torch_stvit.create_model("stvit_small").load_state_dict(back, strict=True)
    assert torch.equal(back["norm.weight"], states["model"]["norm.weight"])
    assert 0.01 < back["head.weight"].std() < 0.03 and back["norm.num_batches_tracked"] == 0


@pytest.mark.docs
def test_outputs_in_homes_and_of_other_forms(states, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    torch.save(states["model"], "in.pth")
    said = run(capsys, "~/in.pth", "--output", "~/out.safetensors")
    assert f"sha256   {sha256(tmp_path / 'out.safetensors')}" in said
    assert ".npz is not written" in refused(capsys, "in.pth", "--output", "out.npz")
    assert "is an address" in refused(capsys, "in.pth", "--output", "s3://bucket/out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "out.safetensors"]


def test_what_is_no_stvit_is_refused_with_both_lists(states, tmp_path, capsys):
    state = dict(states["model"])
    state["layer1.0.conv1.weight"] = state.pop("layers.1.blocks.1.mlp2.fc1.bias")
    torch.save(state, tmp_path / "in.pth")
    error = refused(capsys, tmp_path / "in.pth", "--output", tmp_path / "out")
    assert "unexpected: layer1.0.conv1.weight; " in error
    assert "missing: layers.1.blocks.1.mlp2.fc1.bias" in error
    assert not (tmp_path / "out").exists()


def test_a_wrong_shape_is_refused(states, tmp_path, capsys):
    state = dict(states["model"])
    state["proj.weight"] = state["proj.weight"][:100].clone()
    torch.save(state, tmp_path / "in.pth")
    error = refused(capsys, tmp_path / "in.pth", "--output", tmp_path / "out")
    assert "params/proj/kernel has shape (512, 100) there and (512, 1024) here" in error


@pytest.mark.docs
def test_another_network_is_stated_once_and_verified(data_dir, golden_state, tmp_path, capsys):
    state = {k: x.astype(np.float32) if x.ndim else x for k, x in golden_state("tiny_iter").items()}
    safetensors.numpy.save_file(state, tmp_path / "in.safetensors")
    overrides = json.loads((data_dir / "tiny_iter_config.json").read_text())
    output = tmp_path / "out"
    error = refused(capsys, tmp_path / "in.safetensors", "--output", output)
    assert "--model stvit_small --embed_dim=16,32,48,64" in error
    flags = [
        f"--{field}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for field, value in overrides.items()
        if field not in ("init_values", "drop_path_rate")
    ]
    said = run(
        capsys,
        tmp_path / "in.safetensors",
        *("--output", output, "--model", "stvit_small", "--verify", *flags),
    )
    assert "verify     PyTorch and Flax in float64: largest difference" in said
    settings = fit.identify(weights.read(output)).settings
    assert settings["n_iter"] == overrides["n_iter"]
    assert settings["num_heads"] == overrides["num_heads"]


def test_verify_notices_other_heads():
    settings = {"embed_dim": (16,), "depths": (1,), "n_iter": (1,), "stoken_size": (4,)}
    settings |= {"name": "stvit_small", "layerscale": (False,), "num_heads": (2,)}
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: np.asarray(rng.uniform(0.1, 1, x.shape) if x.ndim else 5, x.dtype),
        abstract(create(settings)),
    )
    before = fit.identify(weights.Weights(variables, settings, Path("before"), {}))
    after = dataclasses.replace(before, settings=before.settings | {"num_heads": [4]})
    assert "largest difference" in convert_torch_weights.compare(before, before)
    with pytest.raises(UserError, match="they do not agree"):
        convert_torch_weights.compare(before, after)


def test_mistakes_on_the_command_line(published, tmp_path, capsys):
    assert "overrides need --model" in refused(capsys, published, "--output", "x", "--depths=1,2")
    assert "there are no weights" in refused(capsys, tmp_path / "a.pth", "--output", "x")
    (tmp_path / "there.pth").touch()
    assert "exists" in refused(capsys, published, "--output", tmp_path / "there.pth")
    error = refused(capsys, published, "--output", tmp_path / "x", "--model", "stvit_base")
    assert "not stvit_base: embed_dim is (64, 128, 320, 512) there and (96, 192" in error
    error = refused(capsys, published, "--output", tmp_path / "x", "--model", "stvit_smal")
    assert "did you mean 'stvit_small'" in error
