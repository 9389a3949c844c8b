"""The network apart from parity: norms, drop path, dtypes, intermediates, settings."""

import ast
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stvit_jax
from benchmarks.hlo import collectives
from stvit_jax.errors import UserError
from stvit_jax.models.layers import BatchNorm
from stvit_jax.models.settings import abstract
from stvit_jax.models.settings import images as input_of

ROOT = Path(__file__).parents[2]
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"


@pytest.fixture(scope="module")
def tiny(random_variables):
    model = stvit_jax.create_model("stvit_tiny", drop_path_rate=0.5)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(8, 32, 32, 3)), jnp.float32)
    return model, random_variables(model), images


def apply_norm(x, group_size, train=True):
    norm = BatchNorm(group_size, x.dtype, jnp.float32)
    variables = {
        "params": {"scale": jnp.array([2.0, 0.5]), "bias": jnp.array([1.0, -1.0])},
        "batch_stats": {
            "mean": jnp.array([0.3, -0.2]),
            "var": jnp.array([1.5, 0.7]),
            "count": jnp.array(4),
        },
    }
    return norm.apply(variables, x, train=train, mutable=["batch_stats"])


@pytest.mark.parametrize("group_size", [0, 2, 3])
def test_batch_norm_per_group(group_size):
    x = np.random.default_rng(1).normal(3.0, 2.0, size=(6, 2, 3, 2)).astype(np.float32)
    y, new = apply_norm(jnp.asarray(x), group_size)
    means, variances = [], []
    for start in range(0, 6, group_size or 6):
        group = x[start : start + (group_size or 6)].astype(np.float64)
        mean, var = group.mean((0, 1, 2)), group.var((0, 1, 2))
        expected = (group - mean) / np.sqrt(var + 1e-5) * [2.0, 0.5] + [1.0, -1.0]
        np.testing.assert_allclose(y[start : start + len(group)], expected, atol=1e-5)
        means.append(mean)
        variances.append(group.var((0, 1, 2), ddof=1))
    stats = new["batch_stats"]
    np.testing.assert_allclose(
        stats["mean"], 0.9 * np.array([0.3, -0.2]) + 0.1 * np.mean(means, 0), rtol=1e-5
    )
    np.testing.assert_allclose(
        stats["var"], 0.9 * np.array([1.5, 0.7]) + 0.1 * np.mean(variances, 0), rtol=1e-5
    )
    assert stats["count"] == 5


def test_batch_norm_of_a_distant_mean_does_not_cancel():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8, 8, 2)), jnp.float32)
    norm = BatchNorm(0, jnp.float32, jnp.float32)
    stats = {"mean": jnp.full(2, 1e4), "var": jnp.ones(2), "count": jnp.array(0)}
    params = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
    y, _ = norm.apply(
        {"params": params, "batch_stats": stats}, x + 1e4, train=True, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(jnp.var(y, (0, 1, 2)), 1, rtol=1e-3)


@pytest.mark.parametrize("train", [False, True])
def test_batch_norm_of_bfloat16_computes_in_float32(train):
    """The mean is large against the deviations, which bfloat16 would round away."""
    x = jnp.asarray(np.random.default_rng(0).normal(40, 1, (64, 8, 8, 2)), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    mean, var = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
    norm = BatchNorm(0, jnp.bfloat16, jnp.float32)
    stats = {"mean": mean + 0.3, "var": var, "count": jnp.array(0)}
    variables = {
        "params": {"scale": jnp.ones(2), "bias": jnp.zeros(2)},
        "batch_stats": jax.tree.map(lambda s: jnp.asarray(s, jnp.float32), stats),
    }
    y, new = norm.apply(variables, x, train=train, mutable=["batch_stats"])
    expected = (exact - (mean if train else mean + 0.3)) / np.sqrt(var + 1e-5)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-4)
    if train:
        moved = new["batch_stats"]["mean"] - variables["batch_stats"]["mean"]
        np.testing.assert_allclose(moved, -0.03, rtol=1e-3)


def test_batch_norm_of_one_value_is_an_error():
    with pytest.raises(UserError, match="more than one value"):
        apply_norm(jnp.ones((1, 1, 1, 2)), 0)


def test_collectives_are_seen_in_every_form():
    program = """
  %all-reduce.7 = f32[4]{0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
  %s = (f32[4]{0}, f32[4]{0}) all-gather-start(%all-reduce.7), dimensions={0}
  %d = f32[4]{0} all-gather-done(%s)
  ROOT %c = f32[4]{0} collective-permute(%d)
"""
    kinds = [c.kind for c in collectives(program)]
    assert kinds == ["all-reduce", "all-gather", "collective-permute"]


@pytest.mark.docs
def test_groups_within_a_device_need_no_communication_to_normalise():
    """Groups of the two images of a device need none; the whole batch as one group does."""
    program = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import stvit_jax
from stvit_jax.models.settings import abstract
from benchmarks.hlo import collectives
images = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.float32)
mesh = Mesh(np.array(jax.devices()), ("data",))
split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
print(mesh.size)
for group_size in (2, 0):
    model = stvit_jax.create_model("stvit_tiny", group_size=group_size, depths=(1, 1, 1, 1))
    def logits(v, x):
        return model.apply(v, x, train=True, mutable=["batch_stats"])[0]
    compiled = jax.jit(logits, in_shardings=(whole, split), out_shardings=split)
    text = compiled.lower(abstract(model), images).compile().as_text()
    print([c.kind for c in collectives(text)])
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {EIGHT_DEVICES}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    devices, within, across = result.stdout.splitlines()
    assert (devices, within) == ("8", "[]")
    assert set(ast.literal_eval(across)) == {"all-reduce"}


def test_drop_path_draws_a_mask_per_sample_and_branch(tiny):
    """With a rate close to 1 in the last block both branches vanish for almost every sample."""
    model, variables, images = tiny

    @jax.jit
    def logits(rate, key):
        return model.apply(
            variables,
            images,
            train=True,
            drop_path_rate=rate,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(key)},
        )[0]

    a, b = logits(0.5, 0), logits(0.5, 1)
    np.testing.assert_array_equal(a, logits(0.5, 0))
    assert np.abs(a - b).max() > 1e-3
    np.testing.assert_allclose(logits(0.0, 3), logits(0.0, 4), atol=0)


def test_drop_path_masks_and_scale():
    from stvit_jax.models.layers import Layers
    from stvit_jax.models.stvit import Block

    class TwoBranches(Block):
        def __call__(self, x, rate):
            rows = jnp.arange(x.shape[0])
            return self.drop_path(x, rows, rate, True), self.drop_path(x, rows, rate, True)

    block = TwoBranches(Layers(jnp.float32, 0), 1, 1, 1, 4, True, False, 0.0)
    ones = jnp.ones((4000, 2, 2, 3))
    first, second = block.apply({}, ones, 0.25, rngs={"dropout": jax.random.key(0)})
    for branch in (first, second):
        values = np.asarray(branch).reshape(4000, -1)
        assert (values == values[:, :1]).all()  # per sample
        kept = values[:, 0] > 0
        np.testing.assert_allclose(values[kept, 0], 1 / 0.75, rtol=1e-6)
        assert abs(kept.mean() - 0.75) < 0.03
    both = (np.asarray(first)[:, 0, 0, 0] > 0) & (np.asarray(second)[:, 0, 0, 0] > 0)
    assert abs(both.mean() - 0.75**2) < 0.03  # independent


def test_drop_path_rates_rise_through_all_stages(monkeypatch):
    from stvit_jax.models import stvit as module

    rates = []
    monkeypatch.setattr(
        module.Block, "drop_path", lambda self, y, rows, rate, train: rates.append(rate) or y
    )
    model = stvit_jax.create_model("stvit_tiny", drop_path_rate=0.5)
    abstract(model)
    np.testing.assert_allclose(rates, np.repeat(0.5 * np.arange(6) / 5, 2))


@pytest.mark.docs
def test_bfloat16_stays_on_the_residual_stream_and_logits_are_wide(tiny):
    _, variables, images = tiny
    model = stvit_jax.create_model("stvit_tiny", dtype=jnp.bfloat16)

    def everything(m, x):
        return m.feature_maps(x), m.features(x), m(x)

    apply = partial(model.apply, method=everything, mutable=["intermediates"])
    (maps, features, logits), state = jax.jit(apply)(variables, images)
    assert [m.dtype for m in maps] == [jnp.bfloat16] * 4
    assert features.dtype == logits.dtype == "float32"
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {"float32"}  # softmax outputs
    exact = jax.jit(stvit_jax.create_model("stvit_tiny").apply)(variables, images)
    assert np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()
    params = abstract(model)["params"]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_forward_mode_and_hessian_vector_products_agree_with_reverse_mode(random_variables):
    two_stages = dict(
        embed_dim=(8, 16),
        depths=(1, 1),
        num_heads=(1, 2),
        n_iter=(1, 1),
        stoken_size=(4, 1),
        layerscale=(False, True),
    )
    model = stvit_jax.create_model("stvit_tiny", **two_stages, dtype=jnp.float64)
    rng = np.random.default_rng(0)
    variables = random_variables(model)
    params = jax.tree.map(jnp.float64, variables["params"])
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), params)
    images = jnp.asarray(rng.normal(size=(2, 32, 32, 3)))

    def loss(params):
        return jnp.mean(model.apply(variables | {"params": params}, images) ** 3)

    def slope(params):  # forward mode
        return jax.jvp(loss, (params,), (direction,))[1]

    @jax.jit
    def both_ways(params):
        gradient, forward = jax.jvp(jax.grad(loss), (params,), (direction,))
        return gradient, slope(params), forward, jax.grad(slope)(params)

    gradient, tangent, forward, reverse = both_ways(params)
    products = jax.tree.map(jnp.vdot, gradient, direction)
    np.testing.assert_allclose(tangent, sum(jax.tree.leaves(products)), rtol=1e-9)
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(forward))
    assert size > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * size), forward, reverse
    )


def test_feature_maps_and_intermediates(tiny):
    model, variables, images = tiny
    apply = partial(model.apply, method="feature_maps", mutable=["intermediates"])
    maps, state = jax.jit(apply)(variables, images)
    assert [m.shape for m in maps] == [
        (8, 8, 8, 32),
        (8, 4, 4, 64),
        (8, 2, 2, 128),
        (8, 1, 1, 160),
    ]
    sown = state["intermediates"]
    first = sown["layers_0"]["blocks_0"]["attn"]
    assert first["association"][0].shape == (8, 2, 2, 16, 9)
    assert first["attention"][0].shape == (8, 1, 4, 4)
    assert "association" not in sown["layers_2"]["blocks_0"]["attn"]  # cell size 1
    attention = sown["layers_3"]["blocks_0"]["attn"]["attention"][0]
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
    assert sum("attention" in s["attn"] for stage in sown.values() for s in stage.values()) == 6


def test_initialisation_is_the_published_one():
    settings = dict(embed_dim=(64, 64, 64, 64), num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1))
    model = stvit_jax.create_model(
        "stvit_tiny", projection=512, layerscale=(False, True, False, False), **settings
    )
    images = input_of(model)
    variables = jax.jit(lambda key: model.lazy_init(key, images))(jax.random.key(1))
    params = variables["params"]

    def assert_uniform(leaf, fan_in):
        bound = fan_in**-0.5
        assert np.abs(leaf).max() <= bound
        if leaf.size >= 500:
            assert np.abs(leaf).max() > 0.98 * bound
            assert np.std(leaf) == pytest.approx(bound / 3**0.5, rel=0.06)

    block = params["layers_1"]["blocks_0"]
    for module, fan_in in (
        (params["patch_embed"]["proj_9"], 9 * 64),
        (params["layers_0"]["downsample"]["proj_0"], 9 * 64),
        (block["pos_embed"], 9),
        (block["mlp2"]["conv"], 9),
        (block["mlp2"]["fc1"], 64),
        (block["mlp2"]["fc2"], 256),
        (block["attn"]["qkv"], 64),
        (block["attn"]["proj"], 64),
        (params["proj"], 64),
    ):
        assert_uniform(module["kernel"], fan_in)
        assert_uniform(module["bias"], fan_in)
        assert np.abs(module["bias"]).max() > 0
    head = params["head"]
    assert np.std(head["kernel"]) == pytest.approx(0.02, rel=0.05)
    assert not head["bias"].any()
    np.testing.assert_array_equal(block["gamma_1"], np.full(64, 1e-6, np.float32))
    assert "gamma_1" not in params["layers_0"]["blocks_0"]
    assert (params["norm"]["scale"] == 1).all() and not params["norm"]["bias"].any()


def test_any_image_size_and_class_count(random_variables):
    model = stvit_jax.create_model("stvit_tiny", num_classes=7, stoken_size=(8, 4, 2, 1))
    variables = random_variables(model)
    for height, width in ((50, 75), (33, 40)):  # 13 x 19 and 9 x 10 tokens, cells of 8
        images = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
        assert jax.eval_shape(model.apply, variables, images).shape == (2, 7)


def test_names_are_listed():
    assert stvit_jax.list_models() == ["stvit_base", "stvit_large", "stvit_small", "stvit_tiny"]


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("stvit_smal", {}, "did you mean 'stvit_small'"),
        ("stvit_tiny", {"embed_dims": (1,)}, "did you mean 'embed_dim'"),
        ("stvit_tiny", {"depths": (1, 2)}, "model.depths has 2 stages, embed_dim has 4"),
        ("stvit_tiny", {"num_heads": (1, 2, 3, 5)}, "128 is not divisible by its num_heads 3"),
        ("stvit_tiny", {"n_iter": (0, 1, 1, 1)}, "model.n_iter is"),
        ("stvit_tiny", {"drop_path_rate": 1.0}, "model.drop_path_rate is 1.0"),
    ],
)
def test_mistakes_are_named(name, settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        stvit_jax.create_model(name, **settings)
