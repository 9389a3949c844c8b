"""Every form of file, in and out; recognition; what a network takes from a file."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from stvit_jax import torch_weights
from stvit_jax.checkpoints import directories, fit, weights
from stvit_jax.checkpoints.fit import load_weights
from stvit_jax.errors import UserError
from stvit_jax.models.settings import complete, create
from stvit_jax.models.stvit import create_model
from tests.checkpoints.networks import FORMS, assert_bits_equal, tree_of


@pytest.mark.parametrize("first, second", list(itertools.product(FORMS.values(), repeat=2)))
def test_every_form_into_every_other_keeps_every_bit(first, second, tiny, tmp_path):
    names = tuple(f"class {i}" for i in range(9)) + ("café",)
    weights.write(tmp_path / "a" / first, dataclasses.replace(tiny, classes=names))
    weights.write(tmp_path / "b" / second, weights.read(tmp_path / "a" / first))
    last = weights.read(tmp_path / "b" / second)
    assert_bits_equal(last.variables, tiny.variables)
    assert (last.settings, last.classes) == (tiny.settings, names)
    assert last.variables["batch_stats"]["norm"]["count"].dtype == np.int64
    assert not list(tmp_path.glob("?/*.tmp*"))


@pytest.mark.parametrize("form", FORMS.values())
@pytest.mark.parametrize("names", [["a"] * 9, [*range(10)], {"a": 1}])
def test_names_that_are_not_one_for_each_class_are_left_out(form, names, tiny, tmp_path):
    weights.write(tmp_path / form, dataclasses.replace(tiny, classes=names))
    found = weights.read(tmp_path / form)
    assert found.classes is None and "class_names" in found.ignored


@pytest.mark.parametrize("form", FORMS.values())
def test_float64_is_kept(form, tiny, golden_state, tmp_path):
    exact = dataclasses.replace(tiny, variables=tree_of(golden_state("tiny"), np.float64))
    weights.write(tmp_path / form, exact)
    assert_bits_equal(weights.read(tmp_path / form).variables, exact.variables)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened_exactly(dtype, golden_state, tmp_path):
    half = tree_of(golden_state("tiny"), dtype)
    safetensors.numpy.save_file(torch_weights.to_torch(half), tmp_path / "w.safetensors")
    wide = jax.tree.map(lambda x: x.astype(np.float32) if x.ndim else x, half)
    assert_bits_equal(weights.read(tmp_path / "w.safetensors").variables, wide)


def test_other_dtypes_are_refused(golden_state, tmp_path):
    state = {k: x.astype(np.float32) if x.ndim else x for k, x in golden_state("tiny").items()}
    state["head.bias"] = state["head.bias"].astype(np.int8)
    safetensors.numpy.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="params/head/bias is of int8"):
        weights.read(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "stvit_tiny",
        "stvit_small",
        pytest.param("stvit_base", marks=pytest.mark.slow),
        pytest.param("stvit_large", marks=pytest.mark.slow),
    ],
)
def test_variants_and_class_counts_are_recognised(name):
    model = create_model(name, num_classes=37)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    settings = complete(variables, None)
    assert (settings["name"], settings["num_classes"]) == (name, 37)
    assert create(settings) == model
    assert json.loads(json.dumps(settings)) == settings


def test_an_unknown_network_has_to_be_stated(tiny, overrides):
    nameless = dataclasses.replace(tiny, settings=None)
    with pytest.raises(UserError) as caught:
        fit.identify(nameless)
    assert "no variant has these shapes" in str(caught.value)
    assert "--embed_dim=16,32,48,64 --depths=1,2,2,1" in str(caught.value)
    assert "--num_heads" in str(caught.value)
    del overrides["init_values"], overrides["drop_path_rate"], overrides["num_classes"]
    found = fit.identify(nameless, "stvit_small", **overrides)
    assert found.settings == tiny.settings


def test_wrong_statements_list_the_differences(tiny, overrides):
    with pytest.raises(UserError, match=r"depths is \(1, 2, 2, 1\) there and \(3, 5, 9, 3\) in"):
        fit.identify(tiny, "stvit_small", embed_dim=(16, 32, 48, 64), num_heads=(1, 2, 3, 4))
    wrong = overrides | {"layerscale": (False, True, True, False), "projection": 32}
    with pytest.raises(UserError) as caught:
        fit.identify(tiny, "stvit_small", **wrong)
    text = str(caught.value)
    assert "missing: params/layers_1/blocks_0/gamma_1, params/layers_1/blocks_0/gamma_2" in text
    assert "unexpected: params/layers_3/blocks_0/gamma_1" in text
    assert "params/head/kernel has shape (64, 10) there and (32, 10) here" in text


@pytest.mark.parametrize(
    "damage",
    [
        {"depths": 5},
        {"num_heads": [1]},
        {"mlp_ratio": float("inf")},
        {"mlp_ratio": 0},
        {"name": "resnet"},
        {"name": None},
        {"depths": [10**12, 2, 2, 1]},
        {"projection": 10**15},
        {"colour": 1},
    ],
)
def test_absurd_settings_of_a_file_are_one_line(damage, tiny):
    with pytest.raises(UserError, match="made: "):
        fit.identify(dataclasses.replace(tiny, settings=tiny.settings | damage))


@pytest.mark.parametrize("form", FORMS.values())
def test_a_file_with_one_set_has_no_moving_average(form, tiny, tmp_path):
    weights.write(tmp_path / form, tiny)
    with pytest.raises(UserError, match="holds no moving average; leave ema out"):
        weights.read(tmp_path / form, ema=True)


def test_directories_of_other_networks_are_one_line(tiny, tmp_path):
    other = {"params": {"conv": {"kernel": np.ones(3, np.float32)}}, "batch_stats": {}}
    for name, variables in {
        "a": other,
        "b": {"params": [np.ones(3)]},
        "c": {"x": np.ones(3)},
    }.items():
        directories.write(tmp_path / name, variables, {"stvit_config": tiny.settings})
        with pytest.raises(
            UserError, match="not the weights of an STViT: they are of conv|holds no"
        ):
            fit.identify(weights.read(tmp_path / name))


def test_damaged_directory_is_noticed(tiny, tmp_path):
    path = tmp_path / "w"
    weights.write(path, tiny)
    largest = max((path / "weights").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match="is damaged, convert again"):
        weights.read(path)


def test_what_is_no_weights_is_one_line(tmp_path, tiny):
    (tmp_path / "folder").mkdir()
    (tmp_path / "w.txt").write_text("weights")
    for name, message in {
        "absent.pth": "there are no weights at",
        "folder": "neither a directory that convert_torch_weights.py wrote nor the workdir",
        "w.txt": "end in .pth or .safetensors",
    }.items():
        with pytest.raises(UserError, match=message):
            weights.read(tmp_path / name)
    for form in FORMS.values():
        weights.write(tmp_path / form, tiny)
        with pytest.raises(UserError, match="exists; remove it"):
            weights.write(tmp_path / form, tiny)


def test_truncated_foreign_and_promising_safetensors(tiny, tmp_path):
    path = tmp_path / "w.safetensors"
    weights.write(path, tiny)
    whole = path.read_bytes()
    tensor = {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}
    header = json.dumps({"head.weight": tensor}).encode()
    repeated = json.dumps({"a": tensor | {"data_offsets": [0, 4]}}).encode()
    for content in (
        whole[:-100],
        whole[:100],
        b"",
        b"not weights at all",
        (2**62).to_bytes(8, "little") + header,
        len(header).to_bytes(8, "little") + header + bytes(16),
        len(repeated).to_bytes(8, "little") + repeated + bytes(4),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is damaged, or not a safetensors file") as caught:
            weights.read(path)
        assert "\n" not in str(caught.value)


def test_absurd_names_cost_no_memory(tmp_path):
    state = {"layers.999999999999.blocks.0.norm2.weight": np.zeros(1, np.float32)}
    safetensors.numpy.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="unexpected: layers.999999999999"):
        weights.read(tmp_path / "w.safetensors")


def test_load_weights_gives_the_variables_of_the_network(tiny, tmp_path):
    weights.write(tmp_path / "w.pth", tiny)
    model = create(tiny.settings, dtype=jnp.bfloat16)
    variables = load_weights(model, tmp_path / "w.pth")
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    wanted = jax.eval_shape(model.init, jax.random.key(0), images)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(
        lambda x: (x.shape, x.dtype), wanted
    )
    for ours, theirs in zip(
        jax.tree.leaves(variables), jax.tree.leaves(tiny.variables), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_head_of_another_class_count_is_initialised_anew_and_said(tiny, tmp_path, capsys):
    weights.write(tmp_path / "w", tiny)
    model = create(tiny.settings, num_classes=7)
    variables = load_weights(model, tmp_path / "w")
    said = capsys.readouterr().out
    assert "its head has 10 classes, this network 7; the head is re-initialised" in said
    kernel = np.asarray(variables["params"]["head"]["kernel"])
    assert kernel.shape == (64, 7)
    assert 0.01 < kernel.std() < 0.03
    assert not variables["params"]["head"]["bias"].any()
    theirs = tiny.variables["params"]["proj"]["kernel"]
    np.testing.assert_array_equal(variables["params"]["proj"]["kernel"], theirs)


def test_merge_keeps_the_head_that_is_there(tiny):
    ours = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tiny.variables)
    ours["params"]["head"] = {"kernel": np.full((64, 3), 5.0), "bias": np.full(3, 6.0)}
    merged = fit.merge(ours, tiny)
    assert (merged["params"]["head"]["kernel"] == 5).all()
    assert (merged["params"]["head"]["bias"] == 6).all()
    theirs = tiny.variables | {
        "params": tiny.variables["params"] | {"head": ours["params"]["head"]}
    }
    assert_bits_equal(merged, theirs)


def test_what_does_not_fit_is_listed(tiny, tmp_path):
    weights.write(tmp_path / "w", tiny)
    other = create(tiny.settings, layerscale=(False, False, False, True), projection=32)
    with pytest.raises(UserError) as caught:
        load_weights(other, tmp_path / "w")
    text = str(caught.value)
    assert "unexpected: params/layers_2/blocks_0/gamma_1" in text
    assert "params/proj/kernel has shape (64, 64) there and (64, 32) here" in text
    heads = create(tiny.settings, num_heads=(1, 2, 3, 8))
    with pytest.raises(UserError, match=r"has num_heads \(1, 2, 3, 4\), this network"):
        load_weights(heads, tmp_path / "w")
