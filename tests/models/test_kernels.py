"""Which operations have a kernel, by device and dtype, and what a network without them computes."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stvit_jax
from stvit_jax.config import base
from stvit_jax.models.kernels import PLAIN, Kernels, kernels_of
from stvit_jax.tasks import classification


@pytest.mark.parametrize(
    "platform, capability, expected",
    [
        ("gpu", "9.0", Kernels("cudnn", "mosaic_gpu")),
        ("gpu", "8.0", Kernels("cudnn", "plain")),
        ("gpu", "8.9", Kernels("cudnn", "plain")),  # of a consumer card
        ("gpu", "10.0", Kernels("cudnn", "plain")),
        ("gpu", "7.5", PLAIN),
        ("gpu", "gfx942", PLAIN),
        ("tpu", None, Kernels("pallas_tpu", "pallas_tpu")),
        ("cpu", None, PLAIN),
    ],
)
def test_kernels_of_devices(platform, capability, expected):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    assert kernels_of(jnp.bfloat16, device) == expected
    for dtype in (jnp.float32, jnp.float64, jnp.float16):
        assert kernels_of(dtype, device) == PLAIN


def test_the_default_device_decides():
    assert kernels_of(jnp.bfloat16) == PLAIN
    with jax.default_device(jax.devices("cpu")[0]):
        assert kernels_of(jnp.bfloat16) == PLAIN


@pytest.mark.parametrize(
    "changes, devices, expected",
    [
        ({}, 1, ("cudnn", "mosaic_gpu")),
        ({}, 4, ("cudnn", "mosaic_gpu")),
        ({"deterministic": True}, 4, ("plain", "mosaic_gpu")),
        ({"kernels": "plain"}, 4, ("plain", "plain")),
        ({"dtype": "float32"}, 1, ("plain", "plain")),
    ],
)
def test_a_run_has_those_of_its_mesh(changes, devices, expected):
    device = SimpleNamespace(platform="gpu", compute_capability="9.0")
    mesh = SimpleNamespace(size=devices, devices=np.array([device] * devices))
    config = base()
    config.model.name = "stvit_tiny"
    config.update(changes)
    kernels = classification.create(config, mesh, 10, "the digits have").kernels
    assert kernels[:2] == expected
    assert kernels.mesh is (mesh if devices > 1 else None)


def test_what_runs_is_said():
    assert PLAIN.describe() == "kernels: XLA's own"
    said = Kernels("cudnn", "mosaic_gpu").describe()
    assert said == "kernels: attention cuDNN's, depthwise convolutions ours (Mosaic GPU)"


@pytest.mark.slow
def test_bfloat16_is_as_near_to_the_exact_numbers_as_it_can_be(random_variables):
    """Inference, training, and the gradients of all parameters; 0.7, 1.7 and 1.7 % were seen."""
    images = np.random.default_rng(0).normal(size=(16, 64, 64, 3)).astype(np.float32)
    found = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        model = stvit_jax.create_model("stvit_tiny", dtype=dtype)
        variables = random_variables(model)

        def loss(params, model=model, variables=variables):
            logits, _ = model.apply(
                variables | {"params": params}, images, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(logits)), logits

        grads, trained = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {np.dtype("float32")}
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])
        found[dtype] = jax.jit(model.apply)(variables, images), trained, flat
    for ours, exact, most in zip(*found.values(), (0.015, 0.03, 0.03), strict=True):
        assert np.linalg.norm(ours - exact) <= most * np.linalg.norm(exact)
