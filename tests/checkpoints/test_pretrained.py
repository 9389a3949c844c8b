"""Folders to be shared: written whole, read by JAX and PyTorch alike."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch

import convert_torch_weights
import stvit_jax
from benchmarks import torch_stvit
from stvit_jax.checkpoints import weights
from stvit_jax.checkpoints.trained import load_trained
from stvit_jax.errors import UserError
from tests.checkpoints.networks import assert_bits_equal

CLASSES = [f"class {i}" for i in range(10)]


@pytest.fixture(scope="module")
def network(random_variables):
    """Of settings that no variant has."""
    model = stvit_jax.create_model(
        "stvit_tiny", stoken_size=(8, 4, 1, 1), mlp_ratio=3, n_iter=[2] * 4
    )
    return model, jax.tree.map(np.asarray, random_variables(model))


@pytest.fixture
def shared(network, tmp_path) -> Path:
    path = tmp_path / "shared"
    stvit_jax.save_pretrained(path, *network, classes=CLASSES, image_size=32, license="mit")
    return path


def test_a_round_trip_keeps_every_bit_and_all_that_is_known(network, shared):
    model, variables = network
    assert sorted(p.name for p in shared.parent.iterdir()) == ["shared"]
    assert sorted(p.name for p in shared.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((shared / "config.json").read_text())["pretrained_cfg"]["license"] == "mit"
    back, held = stvit_jax.from_pretrained(shared)
    assert back == model
    assert_bits_equal(jax.tree.map(np.asarray, held), variables)
    found = load_trained(shared)
    assert (found.classes, found.image_size) == (tuple(CLASSES), 32)
    with pytest.raises(UserError, match="shared exists; remove it"):
        stvit_jax.save_pretrained(shared, model, variables)


def test_pytorch_loads_it_strictly_and_computes_the_same(network, shared, x64):
    config = json.loads((shared / "config.json").read_text())
    settings = {k: v for k, v in config["stvit_config"].items() if k != "name"}
    peer = torch_stvit.STViT(**settings).double().eval()
    peer.load_state_dict(safetensors.torch.load_file(shared / "model.safetensors"), strict=True)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
    with torch.no_grad():
        theirs = peer(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    model, variables = stvit_jax.from_pretrained(shared, dtype=jnp.float64)
    ours = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9 * np.max(np.abs(theirs)))


@pytest.mark.parametrize(
    "size, crop, mode", [(None, 0.875, "center"), (32, 1.0, "squash"), (384, 1.0, "center")]
)
def test_config_says_how_pictures_are_evaluated(size, crop, mode, network, tmp_path):
    stvit_jax.save_pretrained(tmp_path / "w", *network, image_size=size)
    config = json.loads((tmp_path / "w" / "config.json").read_text())
    cfg = config["pretrained_cfg"]
    assert cfg["input_size"] == [3, size or 224, size or 224]
    assert (cfg["crop_pct"], cfg["crop_mode"], cfg["interpolation"]) == (crop, mode, "bicubic")
    assert (cfg["mean"], cfg["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (cfg["classifier"], cfg["first_conv"]) == ("head", "patch_embed.proj.0")
    assert (config["architecture"], config["num_classes"]) == ("stvit_tiny", 10)
    assert "label_names" not in config


def test_without_a_head_and_with_another_one(network, shared, tmp_path, capsys):
    pooled, variables = stvit_jax.from_pretrained(shared, num_classes=0)
    stvit_jax.save_pretrained(tmp_path / "pooled", pooled, variables)
    back, held = stvit_jax.from_pretrained(tmp_path / "pooled")
    assert back.num_classes == 0
    assert_bits_equal(jax.tree.map(np.asarray, held), jax.tree.map(np.asarray, variables))
    with pytest.raises(UserError, match="has no head"):
        load_trained(tmp_path / "pooled")
    args = [str(tmp_path / "pooled"), "--output", str(tmp_path / "p.pth"), "--verify"]
    assert convert_torch_weights.main(args) == 0
    assert "head.weight" not in torch.load(tmp_path / "p.pth")["model"]
    assert "largest difference" in capsys.readouterr().out
    model, other = stvit_jax.from_pretrained(shared, num_classes=3)
    assert other["params"]["head"]["kernel"].shape[-1] == model.num_classes == 3
    assert "the head is re-initialised" in capsys.readouterr().out


def test_config_json_counts_and_a_foreign_one_does_not(shared):
    path = shared / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"label_names": CLASSES[::-1], "image_size": 64}))
    found = weights.read(shared)
    assert (found.classes, found.image_size) == (tuple(CLASSES[::-1]), 64)
    for foreign in ('{"architectures": ["ViT"], "num_classes": 5, "label_names": 3}', "[]", "3"):
        path.write_text(foreign)
        assert weights.read(shared).classes == tuple(CLASSES)
    path.write_text(json.dumps({"stvit_config": 3}))
    with pytest.raises(UserError, match="its stvit_config is no mapping"):
        weights.read(shared)
    path.write_text("{")
    with pytest.raises(UserError, match=r"config.json is damaged"):
        weights.read(shared)


def test_what_cannot_be_shared_leaves_nothing(network, tmp_path):
    model, variables = network
    path = tmp_path / "w"

    def refused(text: str, *what, **how) -> None:
        with pytest.raises(UserError, match=text):
            stvit_jax.save_pretrained(path, *what, **how)
        assert list(tmp_path.iterdir()) == []

    refused("there are no batch_stats", *stvit_jax.fold_batch_norm(model, variables))
    refused("features_only is not whole", model.clone(features_only=True), variables)
    refused("not the variables of this network", model.clone(num_classes=3), variables)
    refused("9 names for 10 classes", model, variables, classes=CLASSES[:9])
    refused("image_size is", model, variables, image_size=0)
    nan = jax.tree.map(lambda x: x * np.nan if x.ndim else x, variables)
    refused("these weights are not finite", model, nan)
    for address in ("gs://bucket/w", "hf_hub:a/b"):
        with pytest.raises(UserError, match="write a folder on this machine"):
            stvit_jax.save_pretrained(address, model, variables)


def test_one_command_from_a_pth_to_a_shared_folder(network, shared, tmp_path, capsys):
    weights.write(tmp_path / "w.pth", weights.read(shared))
    shutil.rmtree(shared)
    args = [str(tmp_path / "w.pth"), "--output", str(shared), "--pretrained", "--image_size", "64"]
    assert convert_torch_weights.main([*args, "--license", "mit", "--verify"]) == 0
    assert "largest difference" in capsys.readouterr().out
    assert json.loads((shared / "config.json").read_text())["pretrained_cfg"]["license"] == "mit"
    with pytest.raises(UserError, match="--license is written with --pretrained only"):
        convert_torch_weights.main([*args[:2], str(tmp_path / "x.pth"), "--license", "mit"])
    found = load_trained(shared)
    assert (found.classes, found.image_size) == (tuple(CLASSES), 64)
    assert_bits_equal(jax.tree.map(np.asarray, found.variables), network[1])


@pytest.mark.docs
def test_a_run_of_train_py_as_a_folder(straight, tmp_path):
    found = load_trained(straight)
    args = [str(straight), "--output", str(tmp_path / "digits"), "--pretrained"]
    assert convert_torch_weights.main(args) == 0
    back = load_trained(tmp_path / "digits")
    assert (back.model, back.classes, back.image_size) == (found.model, found.classes, 32)
    assert_bits_equal(
        jax.tree.map(np.asarray, back.variables), jax.tree.map(np.asarray, found.variables)
    )
