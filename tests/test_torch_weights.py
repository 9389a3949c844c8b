"""Names and layouts, both ways."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import stvit_jax
from stvit_jax import torch_weights
from stvit_jax.errors import UserError

MODELS = [
    "stvit_small",
    pytest.param("stvit_base", marks=pytest.mark.slow),
    pytest.param("stvit_large", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", [*MODELS, "tiny", "tiny_iter"])
def test_round_trip_keeps_every_bit_name_and_the_order(name, golden_state):
    state = golden_state(name)
    back = torch_weights.to_torch(torch_weights.from_torch(state))
    assert list(back) == list(state)
    for key, array in state.items():
        assert back[key].dtype == array.dtype
        np.testing.assert_array_equal(back[key], array, err_msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_structure_and_shapes_are_the_networks(name, golden_state):
    model = stvit_jax.create_model(name)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    ours = jax.eval_shape(model.init, jax.random.key(0), images)
    theirs = torch_weights.from_torch(golden_state(name))
    assert jax.tree.map(lambda a: a.shape, ours) == jax.tree.map(lambda a: a.shape, theirs)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtype_is_kept(dtype, golden_state):
    state = {k: v.astype(dtype) if v.ndim else v for k, v in golden_state("tiny").items()}
    variables = torch_weights.from_torch(state)
    assert variables["params"]["head"]["kernel"].dtype == dtype
    back = torch_weights.to_torch(variables)
    assert all(back[key].dtype == state[key].dtype for key in state)


def test_without_qkv_bias(golden_state):
    state = {k: v for k, v in golden_state("tiny").items() if not k.endswith("qkv.bias")}
    assert list(torch_weights.to_torch(torch_weights.from_torch(state))) == list(state)


def test_both_leftover_lists_are_named(golden_state):
    state = golden_state("tiny")
    state["layers.0.blocks.0.bogus.weight"] = state.pop("layers.1.blocks.1.mlp2.fc1.bias")
    with pytest.raises(UserError) as caught:
        torch_weights.from_torch(state)
    assert "unexpected: layers.0.blocks.0.bogus.weight;" in str(caught.value)
    assert "missing: layers.1.blocks.1.mlp2.fc1.bias" in str(caught.value)


def test_leftovers_of_flax_variables_are_named(golden_state):
    variables = torch_weights.from_torch(golden_state("tiny"))
    variables["params"]["head"]["extra"] = variables["params"]["head"].pop("bias")
    with pytest.raises(UserError) as caught:
        torch_weights.to_torch(variables)
    assert "unexpected: params/head/extra;" in str(caught.value)
    assert "missing: head.bias" in str(caught.value)


def test_a_missing_block_in_the_middle_is_missing(golden_state):
    state = {k: v for k, v in golden_state("stvit_small").items() if ".2.blocks.4." not in k}
    with pytest.raises(UserError, match="missing: layers.2.blocks.4.pos_embed.conv.weight"):
        torch_weights.from_torch(state)


def test_foreign_weights_and_shapes_are_refused(golden_state):
    with pytest.raises(UserError, match="not the weights of an STViT"):
        torch_weights.from_torch({"conv1.weight": np.zeros((64, 3, 7, 7))})
    state = golden_state("tiny")
    state["head.weight"] = state["head.weight"][None]
    with pytest.raises(UserError, match="head.weight has shape"):
        torch_weights.from_torch(state)
    state = golden_state("tiny")
    state["layers.0.blocks.0.attn.fold.weights"] *= 2
    with pytest.raises(UserError, match="one-hot"):
        torch_weights.from_torch(state)


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("layers.0.blocks.0.mlp2.fc1.weight", (64, 16, 3, 3), "(any, any, 1, 1)"),
        ("layers.0.blocks.0.mlp2.fc1.weight", (64, 16, 0, 0), "(any, any, 1, 1)"),
        ("layers.0.blocks.0.pos_embed.conv.weight", (16, 1, 1, 1), "(any, any, 3, 3)"),
        ("layers.2.blocks.0.gamma_1", (48, 1, 1, 1), "(1, any, 1, 1)"),
        ("norm.num_batches_tracked", (1,), "()"),
    ],
)
def test_layouts_that_would_be_cut_or_turned_silently_are_refused(
    name, shape, expected, golden_state
):
    state = golden_state("tiny") | {name: np.zeros(shape)}
    with pytest.raises(UserError) as caught:
        torch_weights.from_torch(state)
    assert str(caught.value) == f"{name} has shape {shape}; expected {expected}"


@pytest.mark.parametrize("tail", [("head.",), ("proj.", "norm.", "head.")])
def test_what_follows_the_stages_may_be_missing_where_that_is_said(tail, golden_state):
    backbone = {k: v for k, v in golden_state("tiny").items() if not k.startswith(tail)}
    variables = torch_weights.from_torch(backbone, partial=True)
    whole = torch_weights.from_torch(golden_state("tiny"))
    assert whole["params"].keys() - variables["params"].keys() == {t[:-1] for t in tail}
    for attempt in (backbone, {k: v for k, v in backbone.items() if "norm2.bias" not in k}):
        with pytest.raises(UserError, match="missing: "):
            torch_weights.from_torch(attempt, partial=len(attempt) < len(backbone))


def test_lists_and_numbers_in_names_end(golden_state):
    state = golden_state("tiny") | {"layers.99.blocks.99.norm2.weight": np.zeros(1)}
    with pytest.raises(UserError, match=r"and \d+ more \(\d+ in all\)$") as caught:
        torch_weights.from_torch(state)
    assert len(str(caught.value)) < 700
    absurd = "layers.999999999999.blocks.0.norm2.weight\n\x1b[2J"
    with pytest.raises(UserError, match="unexpected: layers.9{12}") as caught:
        torch_weights.from_torch(golden_state("tiny") | {absurd: np.zeros(1)})
    assert str(caught.value).isprintable()
