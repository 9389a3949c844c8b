"""Segmenters next to their PyTorch peers in float64: values, gradients, statistics, names."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import stvit_jax
from benchmarks import torch_segmenter
from stvit_jax import torch_weights
from stvit_jax.errors import UserError
from stvit_jax.models import settings
from stvit_jax.ops import attention, resize, segmentation
from tests.parity import assert_close

TOLERANCE = 1e-9
SMALL = dict(
    embed_dim=(8, 16, 24, 32),
    depths=(1, 1, 1, 1),
    num_heads=(1, 2, 3, 4),
    stoken_size=(4, 2, 1, 1),
    layerscale=(False, False, True, True),
    init_values=0.5,
)
HEAD = dict(num_classes=7, channels=12, dropout=0.0)
KINDS = pytest.mark.parametrize("kind", ["upernet", "fpn"])
SIZES = pytest.mark.parametrize("size", [(75, 41), pytest.param((64, 96), marks=pytest.mark.slow)])


def pair(kind):
    """The peer with random weights and non-trivial statistics, our network, and its variables."""
    torch.manual_seed(0)
    peer = torch_segmenter.create_segmenter(kind, "stvit_small", **HEAD, **SMALL).double()
    for key, value in peer.state_dict().items():
        if key.endswith("running_var") or (value.ndim == 1 and key.endswith("weight")):
            value.uniform_(0.5, 1.5)
        elif key.endswith(("running_mean", "bias")):
            value.normal_(0, 0.1)
        elif key.endswith("conv_seg.weight"):
            value.normal_(0, 0.3)
    network = stvit_jax.create_segmenter(kind, "stvit_small", **HEAD, **SMALL, dtype=jnp.float64)
    state = {key: value.numpy().copy() for key, value in peer.state_dict().items()}
    return peer, network, torch_weights.from_torch(state)


def inputs(height, width):
    x = np.random.default_rng(0).normal(size=(2, height, width, 3))
    return torch.from_numpy(x).permute(0, 3, 1, 2), x


def channels_last(tensor):
    return tensor.detach().permute(0, 2, 3, 1).numpy()


@pytest.mark.usefixtures("x64")
@KINDS
@SIZES
def test_inference(kind, size):
    peer, network, variables = pair(kind)
    x, ours_x = inputs(*size)
    logits = jax.jit(network.apply)(variables, ours_x)
    assert logits.shape == (2, *size, 7)
    with torch.no_grad():
        expected = peer.eval()(x)
    assert_close({"logits": logits}, {"logits": channels_last(expected)}, TOLERANCE)


@pytest.mark.usefixtures("x64")
@KINDS
@SIZES
def test_training_step(kind, size):
    """The loss of all heads, every gradient, and the running statistics after it."""
    peer, network, variables = pair(kind)
    x, ours_x = inputs(*size)
    labels = np.random.default_rng(1).integers(0, 7, (2, *size))
    labels[:, :5] = 255
    total = 0
    for logits, weight in zip(peer.train().head_logits(x), (1, 0.4), strict=False):
        logits = torch_segmenter.resized(logits, size)
        losses = torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(labels), ignore_index=255, reduction="sum"
        )
        total += weight * losses / (labels.size + np.finfo(np.float32).eps)
    total.backward()

    def loss(params):
        outputs, new = network.apply(
            variables | {"params": params},
            ours_x,
            train=True,
            mutable=["batch_stats"],
            method="head_logits",
        )
        assert (outputs.auxiliary is None) == (kind == "fpn")
        sizes = [-(-s // 4) for s in size], [-(-s // 16) for s in size]
        total = 0
        for logits, expected, weight in zip(outputs, sizes, (1, 0.4), strict=True):
            if logits is not None:
                assert list(logits.shape[1:3]) == expected
                logits = resize.bilinear(logits, size)
                total += weight * segmentation.cross_entropy(logits, labels)
        return total, new["batch_stats"]

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (ours, statistics), gradients = step(variables["params"])
    assert_close({"loss": ours}, {"loss": total.detach().numpy()}, TOLERANCE)
    state = torch_weights.to_torch({"params": gradients, "batch_stats": statistics})
    largest = max(float(p.grad.abs().max()) for p in peer.parameters())
    for name, parameter in peer.named_parameters():
        # Of biases before a BatchNorm they are rounding noise.
        difference = np.max(np.abs(state[name] - parameter.grad.numpy()))
        scale = max(float(parameter.grad.abs().max()), 1e-6 * largest)
        assert difference <= TOLERANCE * scale, name
    buffers = {k: v.numpy() for k, v in peer.named_buffers() if "fold" not in k}
    assert_close(state, buffers, TOLERANCE)
    assert len(dict(peer.named_parameters())) == len(jax.tree.leaves(gradients))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["upernet", "fpn"])
def test_names_both_ways(kind):
    """Every bit, name and shape; the initialisation makes the same tree."""
    peer, network, variables = pair(kind)
    state = {key: value.numpy() for key, value in peer.state_dict().items()}
    back = torch_weights.to_torch(variables)
    assert sorted(back) == sorted(state)
    assert list(back)[:2] == [
        "backbone.patch_embed.proj.0.weight",
        "backbone.patch_embed.proj.0.bias",
    ]
    for key, array in state.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)
    peer.load_state_dict({k: torch.from_numpy(v) for k, v in back.items()}, strict=True)
    abstract = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert jax.tree.map(np.shape, abstract) == jax.tree.map(np.shape, variables)


@pytest.mark.parametrize(
    "wrong, lists",
    [
        ("backbone.norm3.weight", "missing: backbone.norm3.weight"),
        ("backbone.layers.1.blocks.0.mlp2.fc1.bias", "missing: backbone.layers.1.blocks.0.mlp2"),
        ("auxiliary_head.convs.0.bn.num_batches_tracked", "missing: auxiliary_head.convs.0.bn"),
    ],
)
def test_what_is_missing_or_too_much_is_listed(wrong, lists):
    peer, *_ = pair("upernet")
    state = {key: value.numpy() for key, value in peer.state_dict().items()}
    state["backbone.head.bias"] = state.pop(wrong)
    with pytest.raises(UserError, match="not the weights of a segmenter") as caught:
        torch_weights.from_torch(state)
    assert "unexpected: backbone.head.bias;" in str(caught.value) and lists in str(caught.value)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_frozen_batch_norm_and_remat(random_variables):
    """Dropping is drawn again when blocks are computed again; only the backbone's norms freeze."""
    how = dict(num_classes=5, channels=8, drop_path_rate=0.5, freeze_bn=True, dtype=jnp.float64)
    network = stvit_jax.create_segmenter("fpn", "stvit_small", **how | SMALL)
    x = inputs(32, 32)[1]
    variables = random_variables(network)
    variables = jax.tree.map(lambda v: v.astype(np.float64) if v.ndim else v, variables)

    def loss(params, network):
        how = dict(rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])
        how |= dict(train=True, method="head_logits")
        (logits, _), new = network.apply(variables | {"params": params}, x, **how)
        return jnp.sum(jnp.sin(logits)), new["batch_stats"]

    grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    gradients, statistics = grad(variables["params"], network)
    again = network.clone(backbone=network.backbone.clone(remat=(0, 2)))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
    pairs = (jax.tree.leaves(grad(variables["params"], again)[0]), jax.tree.leaves(gradients))
    for a, b in zip(*pairs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12 * largest)

    stem = gradients["backbone"]["patch_embed"]
    assert np.all(stem["proj_2"]["scale"] == 0) and np.any(stem["proj_0"]["kernel"] != 0)
    before, after = (s["backbone"] for s in (variables["batch_stats"], statistics))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    name = "scale_heads_0_0"
    assert np.any(gradients["decode_head"][name]["bn"]["scale"] != 0)
    assert int(statistics["decode_head"][name]["bn"]["count"]) == 1


@pytest.mark.usefixtures("x64")
def test_a_frozen_backbone_trains_on_the_maps_of_inference(random_variables):
    """Its BatchNorm has the running statistics, not the batch's; there is no drop path."""
    how = dict(num_classes=5, channels=8, dtype=jnp.float64) | SMALL
    network = stvit_jax.create_segmenter("fpn", "stvit_small", **how, freeze_bn=True)
    x = inputs(32, 32)[1]
    variables = random_variables(network)
    alone = {
        name: jax.tree.map(lambda v: v.astype(np.float64) if v.ndim else v, tree["backbone"])
        for name, tree in variables.items()
    }

    @partial(jax.jit, static_argnums=(0, 1))
    def maps(backbone, train):
        how = dict(mutable=["batch_stats"], method="feature_maps")
        return backbone.apply(alone, x, train=train, **how)[0]

    inference = maps(network.backbone, False)
    assert_close(dict(enumerate(maps(network.backbone, True))), dict(enumerate(inference)), 1e-12)
    free = maps(network.backbone.clone(freeze_bn=False), True)
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(free, inference, strict=True))


@pytest.mark.docs
def test_attention_of_many_tokens_never_has_all_pairs_of_them(monkeypatch):
    """Of a picture of 512 x 2048 there are 4,096 tokens in stage 3, with cells of one."""
    network = stvit_jax.create_segmenter("upernet", "stvit_small", depths=(1, 1, 1, 1))
    images = jax.ShapeDtypeStruct((2, 512, 2048, 3), jnp.float32)
    variables = settings.abstract(network)
    how = dict(train=True, mutable=["batch_stats"], method="head_logits")

    def loss(params, batch_stats, images, key):
        held = {"params": params, "batch_stats": batch_stats}
        logits, _ = network.apply(held, images, rngs={"dropout": key}, **how)
        return jnp.sum(logits.main)

    def all_pairs(function):
        args = variables["params"], variables["batch_stats"], images, jax.random.key(0)
        program = str(jax.make_jaxpr(function)(*args))
        assert "2,128,512,64]" in program  # it is of this size
        return re.findall(r"\[(?:\d+,)*4096,(?:\d+,)*4096[,\]]", program)

    assert not all_pairs(jax.grad(loss))
    monkeypatch.setattr(attention, "_LOGITS", 4096**2)  # were they all to be stored at once
    assert all_pairs(loss)


def test_settings_and_types():
    with pytest.raises(UserError, match="unknown head 'upernett'; did you mean 'upernet'"):
        stvit_jax.create_segmenter("upernett")
    with pytest.raises(UserError, match="unknown model 'swin'"):
        stvit_jax.create_segmenter("fpn", "swin")
    with pytest.raises(UserError, match="model.channels is 1"):
        stvit_jax.create_segmenter("fpn", channels=1)
    with pytest.raises(UserError, match="four stages"):
        stages = {k: v[:3] for k, v in SMALL.items() if isinstance(v, tuple)}
        stvit_jax.create_segmenter("fpn", **stages, n_iter=(1, 1, 1))
    network = stvit_jax.create_segmenter("upernet", stoken_size=(16, 8, 2, 1))
    assert network.backbone.stoken_size == (16, 8, 2, 1)
    network = stvit_jax.create_segmenter(
        "upernet", "stvit_tiny", num_classes=3, channels=8, dtype=jnp.bfloat16
    )
    images = jnp.zeros((1, 33, 47, 3))
    logits = jax.eval_shape(partial(network.init_with_output, jax.random.key(0)), images)[0]
    assert logits.shape == (1, 33, 47, 3) and logits.dtype == jnp.float32
