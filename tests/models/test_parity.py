"""The network against the published code's numbers: values, gradients, running statistics."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stvit_jax
from stvit_jax import torch_weights
from tests.golden.golden_weights import images
from tests.parity import TOLERANCE, assert_close, assert_gradients_close

pytestmark = pytest.mark.usefixtures("x64")


def channels_last(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x.transpose(0, 2, 3, 1))


def every_map(model, x):
    """Stem, four stages, pooled features, logits."""
    maps = model.feature_maps(x)
    return [model.patch_embed(x, train=False), *maps, model.features(x), model(x)]


NAMES = ["stem", "stage1", "stage2", "stage3", "stage4", "features", "logits"]


@pytest.fixture(scope="module", params=["tiny", "tiny_iter"])
def small_network(request, data_dir, golden_state):
    with jax.enable_x64(True):
        settings = json.loads((data_dir / f"{request.param}_config.json").read_text())
        model = stvit_jax.create_model("stvit_small", dtype=jnp.float64, **settings)
        variables = torch_weights.from_torch(golden_state(request.param))
        return model, variables, dict(np.load(data_dir / f"{request.param}.npz"))


@pytest.mark.parametrize("height, width", [(64, 64), (72, 56)])
def test_every_map_of_the_small_networks(small_network, height, width):
    model, variables, golden = small_network
    x = channels_last(images(2, height, width))
    outputs = jax.jit(lambda v, x: model.apply(v, x, method=every_map))(variables, x)
    ours = [np.moveaxis(x, -1, 1) if x.ndim == 4 else x for x in outputs]
    expected = {name: golden[f"{height}x{width}/{name}"] for name in NAMES}
    assert_close(dict(zip(NAMES, ours, strict=True)), expected)


def test_training_step_of_the_small_networks(small_network):
    model, variables, golden = small_network
    x = channels_last(images(4, 64, 64, seed=1))
    labels = jnp.arange(4)

    @jax.jit
    def step(params, batch_stats):
        def loss_fn(params):
            logits, new = model.apply(
                {"params": params, "batch_stats": batch_stats},
                x,
                train=True,
                mutable=["batch_stats"],
            )
            return -jnp.mean(jax.nn.log_softmax(logits)[labels, labels]), new["batch_stats"]

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    (loss, batch_stats), grads = step(variables["params"], variables["batch_stats"])
    assert_close({"loss": loss}, {"loss": golden["train/loss"]})
    ours = torch_weights.to_torch({"params": grads, "batch_stats": batch_stats})
    expected_grads, expected_buffers = (
        {name.removeprefix(kind): golden[name] for name in golden if name.startswith(kind)}
        for kind in ("train/grad/", "train/buffer/")
    )
    assert len(expected_grads) == len(jax.tree.leaves(grads))
    counts = [name for name in ours if name.endswith("num_batches_tracked")]
    assert len(expected_buffers) == len(jax.tree.leaves(batch_stats)) - len(counts)
    assert_gradients_close(ours, expected_grads)
    assert_close(ours, expected_buffers)
    assert all(ours[name] == 1001 for name in counts)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name, dtype, tolerance",
    [
        ("stvit_small", "float64", TOLERANCE),
        pytest.param("stvit_small", "float32", 1e-5, marks=slow),
        pytest.param("stvit_base", "float64", TOLERANCE, marks=slow),
        pytest.param("stvit_base", "float32", 1e-5, marks=slow),
        pytest.param("stvit_large", "float64", TOLERANCE, marks=slow),
        pytest.param("stvit_large", "float32", 1e-5, marks=slow),
    ],
)
def test_published_variants(name, dtype, tolerance, data_dir, golden_state):
    model = stvit_jax.create_model(name, dtype=jnp.dtype(dtype))
    variables = torch_weights.from_torch(golden_state(name))
    x = channels_last(images(2, 224, 224))
    if dtype == "float32":
        variables = jax.tree.map(
            lambda a: a.astype(np.float32) if a.dtype == np.float64 else a, variables
        )
        x = x.astype(jnp.float32)
    golden = np.load(data_dir / f"{name}.npz")
    outputs = jax.jit(lambda v, x: model.apply(v, x, method=every_map))(variables, x)
    assert {str(x.dtype) for x in outputs} == {dtype}
    ours = [np.asarray(x).mean((1, 2), np.float64) if x.ndim == 4 else x for x in outputs]
    expected = {name: golden[f"224x224/{name}"] for name in NAMES}
    assert_close(dict(zip(NAMES, ours, strict=True)), expected, tolerance)
