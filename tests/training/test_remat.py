"""Blocks that are computed again in the backward pass: the same numbers, less kept in between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stvit_jax
from stvit_jax.errors import UserError
from stvit_jax.models import settings
from tests.program import TWO_STAGES

KEY = jax.random.key(0)

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(8, 32, 32, 3))


@pytest.fixture(scope="module")
def network(random_variables):
    """A network with these stages `remat`, some fields set otherwise; its variables."""

    def network(remat: tuple[int, ...], **fields):
        model = stvit_jax.create_model(
            "stvit_tiny",
            **TWO_STAGES | fields,
            drop_path_rate=0.5,
            dtype=jnp.float64,
            remat=remat,
        )
        variables = random_variables(model)
        variables["params"] = jax.tree.map(np.float64, variables["params"])
        return model, variables

    return network


def loss_of(model, batch_stats, images, train=True):
    """(parameters) to a loss and all that the network writes."""
    how = {"train": True, "rngs": {"dropout": KEY}} if train else {}
    mutable = ["batch_stats", "intermediates"]

    def loss(params):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, written = model.apply(variables, images, mutable=mutable, **how)
        return jnp.sum(logits**2), written

    return loss


def kept(model, variables, images, train) -> int:
    """Bytes that the backward pass takes from the forward pass."""

    def backward(params):
        loss = loss_of(model, variables["batch_stats"], images, train)
        return jax.vjp(lambda p: loss(p)[0], params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(backward, variables["params"]))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.docs
def test_gradients_statistics_and_intermediates_are_the_same(network, images) -> None:
    """Drop path, too: the second computation draws what the first has drawn."""
    results = []
    for remat in ((), (0, 1)):
        model, variables = network(remat)
        loss = loss_of(model, variables["batch_stats"], images)
        results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"]))
    plain, again = results
    assert len(jax.tree.leaves(plain[0][1]["intermediates"])) == 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), again, plain)


@pytest.mark.parametrize("train", [True, False], ids=["training", "freeze_batch_norm"])
def test_less_is_kept_for_the_backward_pass(network, images, train: bool) -> None:
    none, second, first, both = (
        kept(*network(remat), images, train) for remat in ((), (1,), (0,), (0, 1))
    )
    assert both < first < second < none  # the first stage has four times the pixels
    assert both < 0.6 * none


@pytest.mark.skipif(
    jax.__version_info__ < (0, 12),
    reason="its compiler for CPUs merges the second computation with the first",
)
def test_the_program_takes_less_memory(network, images) -> None:
    """With several blocks a stage: a single block is in memory as a whole while it is redone."""

    def temporaries(remat: tuple[int, ...]) -> int:
        model, variables = network(remat, depths=(3, 3))
        loss = loss_of(model, variables["batch_stats"], images)
        compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(variables["params"]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries((0, 1)) < 0.6 * temporaries(())


@pytest.mark.docs
def test_the_network_is_the_same_one(network) -> None:
    """In the names and shapes of its variables, in how it starts, and in what files say of it."""
    (plain, variables), (again, _) = network(()), network((0, 1))
    assert settings.abstract(plain) == settings.abstract(again)
    inputs = settings.images(plain)
    start = [
        jax.jit(lambda key, model=model: model.lazy_init(key, inputs))(KEY)
        for model in (plain, again)
    ]
    jax.tree.map(np.testing.assert_array_equal, *start)
    assert "remat" not in settings.SETTINGS
    stated = {"name": "stvit_tiny", **TWO_STAGES}
    said = settings.complete(variables, None, **stated)
    assert settings.complete(variables, None, **stated, remat=(0,)) == said


@pytest.mark.parametrize(
    "remat, message",
    [
        ((4,), "remat names stage 4; the network has the stages 0 to 3"),
        ((-1,), "model.remat is (-1,): it must be the numbers of stages, as (0, 1)"),
        (1, "model.remat is 1: it must be the numbers of stages, as (0, 1)"),
        ((True,), "model.remat is (True,): it must be the numbers of stages"),
    ],
)
def test_mistakes_are_named(remat, message: str) -> None:
    with pytest.raises(UserError) as caught:
        stvit_jax.create_model("stvit_tiny", remat=remat)
    assert message in str(caught.value)
