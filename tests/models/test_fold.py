"""The folded network: its outputs are those of the network, with fewer operations."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stvit_jax
from stvit_jax import torch_weights
from stvit_jax.checkpoints import fit, weights
from stvit_jax.errors import UserError
from stvit_jax.models.settings import abstract
from stvit_jax.models.stvit import PatchEmbed, Stage
from stvit_jax.trees import leaves
from tests.golden.golden_weights import images
from tests.parity import assert_close, error

# Sampling twice with cells that do not divide the maps, layer scale, no bias of qkv, an odd width.
ODD = dict(
    n_iter=(2, 1, 1, 1),
    stoken_size=(3, 2, 2, 1),
    layerscale=(True, False, False, True),
    qkv_bias=False,
    mlp_ratio=1.3,
    num_classes=7,
)


def features_and_logits(model, x):
    features = model.features(x)
    return {"features": features, "logits": model.head(features)}


def outputs(model, variables, x) -> dict[str, jax.Array]:
    """Stem, stages, features, logits, and what is sown; by name."""
    apply = partial(
        model.apply,
        method=features_and_logits,
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: isinstance(module, PatchEmbed | Stage),
    )
    results, state = jax.jit(apply)(variables, x)
    return results | leaves(state["intermediates"])


def in_dtype(variables, dtype):
    return jax.tree.map(lambda a: np.asarray(a, dtype if np.ndim(a) else np.int32), variables)


def batch(height, width, dtype):
    return jnp.asarray(images(2, height, width).transpose(0, 2, 3, 1), dtype)


@pytest.fixture(scope="module")
def tiny(random_variables):
    model = stvit_jax.create_model("stvit_tiny", group_size=1)
    return model, random_variables(model)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "settings", [pytest.param({}, marks=pytest.mark.slow), ODD], ids=["tiny", "odd"]
)
def test_equals_the_network_in_float64(settings, random_variables):
    model = stvit_jax.create_model("stvit_tiny", dtype=jnp.float64, **settings)
    variables = in_dtype(random_variables(model), np.float64)
    # Channels whose mean is far from zero, as those of trained networks are.
    variables["batch_stats"] = jax.tree_util.tree_map_with_path(
        lambda path, a: 20 * a if path[-1].key == "mean" else a, variables["batch_stats"]
    )
    folded, fewer = stvit_jax.fold_batch_norm(model, variables)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(fewer)} == {"float64"}
    x = batch(50, 39, jnp.float64)
    expected = outputs(model, variables, x)
    assert_close(outputs(folded, fewer, x), expected, 1e-9)
    for sown in ("association", "attention"):
        assert any(sown in name for name in expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name, size", [("tiny", (64, 64)), ("tiny_iter", (72, 56))])
def test_equals_the_published_numbers(name, size, data_dir, golden_state):
    settings = json.loads((data_dir / f"{name}_config.json").read_text())
    model = stvit_jax.create_model("stvit_small", dtype=jnp.float64, **settings)
    folded, fewer = stvit_jax.fold_batch_norm(model, torch_weights.from_torch(golden_state(name)))
    golden = np.load(data_dir / f"{name}.npz")
    height, width = size
    ours = outputs(folded, fewer, batch(height, width, jnp.float64))
    maps = {"stem": ours["patch_embed/__call__/0"]}
    maps |= {f"stage{i + 1}": ours[f"layers_{i}/__call__/0/0"] for i in range(4)}
    ours |= {name: np.moveaxis(x, -1, 1) for name, x in maps.items()}
    names = [*maps, "features", "logits"]
    assert_close(ours, {name: golden[f"{height}x{width}/{name}"] for name in names}, 1e-9)


@pytest.mark.parametrize(
    "settings", [{}, pytest.param(ODD, marks=pytest.mark.slow)], ids=["tiny", "odd"]
)
def test_equals_the_network_in_float32(settings, random_variables):
    model = stvit_jax.create_model("stvit_tiny", **settings)
    variables = random_variables(model)
    folded, fewer = stvit_jax.fold_batch_norm(model, variables)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(fewer)} == {"float32"}
    x = batch(50, 39, jnp.float32)
    assert_close(outputs(folded, fewer, x), outputs(model, variables, x), 1e-5)


@pytest.mark.docs
def test_in_bfloat16_it_is_as_close_to_the_exact_logits_as_the_network(tiny):
    model, variables = tiny
    x = batch(32, 32, jnp.float32)
    exact = jax.jit(model.apply)(variables, x)
    narrow = model.clone(dtype=jnp.bfloat16)
    folded, fewer = stvit_jax.fold_batch_norm(narrow, variables)
    before, after = (
        error(jax.jit(network.apply)(v, x), exact)
        for network, v in ((narrow, variables), (folded, fewer))
    )
    print(before, after)
    assert 0 < after < 1.5 * before < 0.05


def test_only_operations_are_fewer(tiny):
    """Of the norms the stem's are left, without statistics; the fields are the same."""
    model, variables = tiny
    folded, fewer = stvit_jax.fold_batch_norm(model, variables)
    assert folded == model.clone(folded=True) and list(fewer) == ["params"]
    assert jax.tree.map(jnp.shape, fewer) == jax.tree.map(jnp.shape, abstract(folded))
    before, after = (sum(x.size for x in jax.tree.leaves(v["params"])) for v in (variables, fewer))
    widths = np.array(model.embed_dim)
    norms = widths @ model.depths + sum(widths[1:]) + model.projection
    assert before - after == 2 * norms
    x = batch(32, 32, jnp.float32)
    texts = [
        jax.jit(network.apply).lower(v, x).as_text()
        for network, v in ((model, variables), (folded, fewer))
    ]
    roots = [text.count("stablehlo.rsqrt") for text in texts]
    assert roots[0] - roots[1] == 4 + sum(model.depths) + 3 + 1
    assert texts[0].count("\n") > texts[1].count("\n")


def test_a_backbone_alone_is_folded(tiny):
    model, variables = tiny
    backbone = {
        kind: {name: x for name, x in tree.items() if name not in ("proj", "norm", "head")}
        for kind, tree in variables.items()
    }
    folded, fewer = stvit_jax.fold_batch_norm(model, backbone)
    x = batch(32, 32, jnp.float32)
    ours, theirs = (
        jax.jit(partial(network.apply, method="feature_maps"))(v, x)
        for network, v in ((folded, fewer), (model, variables))
    )
    for a, b in zip(ours, theirs, strict=True):
        assert error(a, b) < 1e-5


def test_folding_twice_is_folding_once(tiny):
    once = stvit_jax.fold_batch_norm(*tiny)
    again = stvit_jax.fold_batch_norm(*once)
    assert again[0] == once[0]
    jax.tree.map(np.testing.assert_array_equal, again[1], once[1])


def test_variables_of_another_network_are_refused(tiny, random_variables):
    model, variables = tiny
    other = stvit_jax.create_model("stvit_tiny", projection=64)
    for wrong, message in (
        (random_variables(other), "params/proj/kernel has shape (160, 64) there and (160, 256)"),
        ({"params": variables["params"]}, "missing: batch_stats/layers_0/blocks_0/norm2/count"),
        (stvit_jax.fold_batch_norm(model, variables)[1], "missing: batch_stats/"),
        (variables["params"], "unexpected: head/bias"),
    ):
        with pytest.raises(UserError, match="^these are not the variables.*" + re.escape(message)):
            stvit_jax.fold_batch_norm(model, wrong)
    with pytest.raises(UserError, match="unexpected: batch_stats/"):
        stvit_jax.fold_batch_norm(model.clone(folded=True), variables)


def test_what_is_not_for_a_folded_network_is_refused(tiny, tmp_path):
    model, variables = tiny
    folded, fewer = stvit_jax.fold_batch_norm(model, variables)
    x = batch(32, 32, jnp.float32)
    training = dict(train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
    with pytest.raises(UserError, match="folded network has no BatchNorm to train"):
        folded.apply(fewer, x, **training)
    for wrong in (variables, {"params": variables["params"]}, {"params": {}}, {}):
        with pytest.raises(UserError, match="not those of a folded network"):
            folded.apply(wrong, x)
    with pytest.raises(UserError, match="hold no 'batch_stats' of this network"):
        model.apply(fewer, x)
    with pytest.raises(UserError, match="write the variables that fold_batch_norm was given"):
        torch_weights.to_torch(fewer)
    for name in ("weights.pth", "weights.safetensors", "directory"):
        held = weights.Weights(fewer, None, tmp_path, {})
        with pytest.raises(UserError, match="write the variables that fold_batch_norm was given"):
            weights.write(tmp_path / name, held)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="stvit_jax.fold_batch_norm"):
        fit.load_weights(folded, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="unknown model setting 'folded'"):
        stvit_jax.create_model("stvit_tiny", folded=True)
