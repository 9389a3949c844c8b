"""Parameter groups and the moving average."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stvit_jax
from stvit_jax import torch_weights
from stvit_jax.models.depth import multipliers
from stvit_jax.training import optimizer
from stvit_jax.trees import leaves


@pytest.mark.parametrize("name", ["stvit_small", "stvit_base", "stvit_large"])
def test_decay_groups_are_the_published_ones(name, data_dir, golden_state):
    golden = json.loads((data_dir / "adamw_groups.json").read_text())[name]
    params = torch_weights.from_torch(golden_state(name))["params"]
    mask = optimizer.decay_mask(params)
    for group, decayed in (("decay", True), ("no_decay", False)):
        sizes = [
            leaf.size
            for leaf, masked in zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True)
            if masked == decayed
        ]
        assert (len(sizes), sum(sizes)) == (golden[group]["tensors"], golden[group]["elements"])


def test_decay_names_are_the_published_ones(data_dir, golden_state):
    golden = json.loads((data_dir / "adamw_groups.json").read_text())["stvit_base"]
    variables = torch_weights.from_torch(golden_state("stvit_base"))
    mask = optimizer.decay_mask(variables["params"])
    marked = jax.tree.map(lambda p, m: np.full(p.shape, m), variables["params"], mask)
    by_name = torch_weights.to_torch(variables | {"params": marked})
    no_decay = [n for n, a in by_name.items() if a.dtype == bool and not a.any()]
    decay = [n for n, a in by_name.items() if a.dtype == bool and a.all() and "fold" not in n]
    assert sorted(no_decay) == sorted(golden["no_decay"]["names"])
    assert sorted(decay) == sorted(golden["decay"]["names"])


def test_average_is_over_every_entry_and_truncates_integers():
    old = {"a": jnp.array([1.0, 3.0]), "n": jnp.array(10)}
    new = optimizer.update_average(old, {"a": jnp.array([2.0, 3.0]), "n": jnp.array(19)}, 0.9)
    np.testing.assert_allclose(new["a"], [1.1, 3.0], rtol=1e-6)
    assert (new["n"].dtype, int(new["n"])) == (jnp.int32, 10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("clip", [0.5, 100.0], ids=["long", "short"])
def test_clipping_is_that_of_optax_before_adam(clip):
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 2))), "bias": jnp.ones(2)}
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grads)))
    tx = optimizer.adamw(lambda step: 0.1, 0.05, clip)
    updates, state = tx.update(grads, tx.init(params), params)

    by_optax = optax.clip_by_global_norm(clip)
    clipped, _ = by_optax.update(grads, by_optax.init(params))
    np.testing.assert_allclose(clipped["bias"], grads["bias"] * min(1, clip / norm), rtol=1e-12)
    plain = optimizer.adamw(lambda step: 0.1, 0.05)
    expected, moments = plain.update(clipped, plain.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    jax.tree.map(np.testing.assert_array_equal, state[1], moments)


def test_without_clipping_the_state_is_that_of_adamw():
    """Checkpoints of runs without it hold no more."""
    params = {"kernel": jnp.ones((3, 2))}
    state = optimizer.adamw(lambda step: 1e-3, 0.05, gradient_clip=0.0).init(params)
    adamw = optax.adamw(lambda step: 1e-3, weight_decay=0.05, mask=optimizer.decay_mask)
    assert jax.tree.structure(state) == jax.tree.structure(adamw.init(params))


@pytest.mark.usefixtures("x64")
def test_learning_rate_follows_the_schedule_and_scales_the_decay():
    tx = optimizer.adamw(lambda step: jnp.where(step < 1, 0.0, 0.1), weight_decay=0.5)
    params = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
    grads = {"kernel": jnp.array([1.0]), "bias": jnp.array([1.0])}
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    assert updates["kernel"] == 0
    updates, _ = tx.update(grads, state, params)  # equal gradients: m / sqrt(v) is 1
    np.testing.assert_allclose(updates["bias"], [-0.1], rtol=1e-7)
    np.testing.assert_allclose(updates["kernel"], [-0.1 - 0.1 * 0.5 * 2], rtol=1e-7)


def test_layers_learn_slower_the_earlier_they_are(random_variables):
    model = stvit_jax.create_model("stvit_tiny")  # of 1, 2, 2 and 1 blocks
    params = random_variables(model)["params"]
    found = leaves(multipliers(params, model.depths, layer_decay=0.5))
    expected = {
        "patch_embed/proj_0/kernel": 0.5**7,
        "layers_0/blocks_0/norm1/scale": 0.5**6,
        "layers_0/downsample/proj_0/kernel": 0.5**6,
        "layers_1/blocks_0/attn/qkv/kernel": 0.5**5,
        "layers_1/blocks_1/mlp2/fc1/bias": 0.5**4,
        "layers_1/downsample/proj_1/bias": 0.5**4,
        "layers_3/blocks_0/pos_embed/bias": 0.5,
        "proj/kernel": 1.0,
        "norm/scale": 1.0,
        "head/bias": 1.0,
    }
    assert expected.items() <= found.items()
    frozen = leaves(multipliers(params, model.depths, freeze_stages=1))
    assert {n for n, m in frozen.items() if m == 0} == {
        n for n in frozen if n.startswith(("patch_embed/", "layers_0/"))
    }
    probe = leaves(multipliers(params, model.depths, linear_probe=True, layer_decay=0.5))
    assert {n: m for n, m in probe.items() if m} == {"head/kernel": 1.0, "head/bias": 1.0}


def test_multipliers_scale_steps_and_decay():
    params = {
        "a": {"kernel": jnp.ones(3)},
        "b": {"kernel": jnp.ones(3)},
        "c": {"bias": jnp.ones(1)},
    }
    grads = jax.tree.map(lambda x: 0.3 * x, params)
    of = {"a": {"kernel": 0.25}, "b": {"kernel": 0.0}, "c": {"bias": 1.0}}
    updates = []
    for rates in (None, lambda params: of):
        tx = optimizer.adamw(lambda step: 0.1, 0.05, multipliers=rates)
        updates.append(tx.update(grads, tx.init(params), params)[0])
    jax.tree.map(
        lambda plain, own, m: np.testing.assert_allclose(own, plain * m, rtol=1e-6), *updates, of
    )


def test_segmentation_s_rule_spares_what_is_called_norm():
    """As many numbers of the backbones as the published names give."""
    expected = {"stvit_small": 20_992, "stvit_base": 39_936, "stvit_large": 61_440}
    for name, spared in expected.items():
        segmenter = stvit_jax.create_segmenter("upernet", name)
        images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
        params = jax.eval_shape(segmenter.init, jax.random.key(0), images)["params"]
        counts = jax.tree.map(
            lambda p, decayed: 0 if decayed else p.size,
            params["backbone"],
            optimizer.DECAYED["mmseg"](params["backbone"]),
        )
        assert sum(jax.tree.leaves(counts)) == spared
        mask = optimizer.DECAYED["mmseg"](params)
        assert all(jax.tree.leaves(mask["decode_head"])) and not any(
            jax.tree.leaves(mask["norm_0"])
        )
        assert all(jax.tree.leaves(optimizer.DECAYED["all"](params)))
