"""Networks without a classifier, and those that give the maps of their stages."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stvit_jax
from stvit_jax.checkpoints import fit, weights
from stvit_jax.errors import UserError
from stvit_jax.models.settings import abstract

TAILS = {"num_classes": {"num_classes": 0}, "features_only": {"features_only": True}}
DROPPED = {"num_classes": ("head",), "features_only": ("proj", "norm", "head")}


@pytest.fixture(scope="module")
def whole(random_variables, tmp_path_factory):
    """A network, its float64 variables and a file of them."""
    path = tmp_path_factory.mktemp("whole") / "w.safetensors"
    with jax.enable_x64(True):
        model = stvit_jax.create_model("stvit_tiny", dtype=jnp.float64)
        variables = jax.tree.map(
            lambda x: x.astype(np.float64) if x.ndim else x, random_variables(model)
        )
    settings = {"name": "stvit_tiny"}
    found = fit.identify(weights.Weights(variables, settings, path, {}))
    weights.write(path, found)
    return model, variables, path


@pytest.mark.parametrize("folded", [pytest.param(False, marks=pytest.mark.docs), True])
@pytest.mark.parametrize("kind", TAILS)
def test_the_numbers_are_those_of_the_whole_network(kind, folded, whole, x64, capsys):
    model, variables, path = whole
    images = np.random.default_rng(0).normal(size=(2, 48, 32, 3))
    method = "features" if kind == "num_classes" else "feature_maps"
    expected = jax.jit(partial(model.apply, method=method))(variables, images)
    part = stvit_jax.create_model("stvit_tiny", dtype=jnp.float64, **TAILS[kind])
    held = stvit_jax.load_weights(part, path)
    names = DROPPED[kind]
    said = f"its {', '.join(names)} {'is' if len(names) == 1 else 'are'} dropped"
    assert said in capsys.readouterr().out
    assert not set(names) & held["params"].keys()
    assert jax.tree.structure(held) == jax.tree.structure(abstract(part))
    if folded:
        part, held = stvit_jax.fold_batch_norm(part, held)
    for ours, theirs in zip(
        jax.tree.leaves(jax.jit(part.apply)(held, images)), jax.tree.leaves(expected), strict=True
    ):
        assert ours.shape == theirs.shape
        largest = np.max(np.abs(theirs))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=(1e-9 if folded else 1e-12) * largest)


def test_feature_info_says_what_the_maps_are():
    model = stvit_jax.create_model("stvit_tiny", features_only=True)
    maps = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], INPUT)
    sizes = [(info["num_chs"], 64 // info["reduction"]) for info in model.feature_info]
    assert [(m.shape[-1], m.shape[1]) for m in maps] == sizes
    assert {info["module"] for info in model.feature_info} <= abstract(model)["params"].keys()
    assert stvit_jax.create_model("stvit_tiny").feature_info == model.feature_info


INPUT = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)


def test_no_pooled_vector_comes_from_maps_alone():
    model = stvit_jax.create_model("stvit_tiny", features_only=True)
    with pytest.raises(UserError, match="features_only has no pooled vector"):
        jax.eval_shape(lambda x: model.apply({}, x, method="features"), INPUT)
