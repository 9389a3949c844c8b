"""The heads against numbers of mmsegmentation's own, and against the plain form of themselves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvit_jax import torch_weights
from stvit_jax.errors import UserError
from stvit_jax.models import heads
from stvit_jax.models.layers import Layers
from stvit_jax.ops import resize, segmentation
from stvit_jax.torch_heads import HEADS
from stvit_jax.torch_rules import Table
from tests.parity import assert_close

TOLERANCE = 1e-10  # of the largest value
KINDS = {
    "uper": ("upernet", heads.UPerHead(9, 10, jnp.float64, dropout=0.0)),
    "aux": ("fcn", heads.FCNHead(9, 8, jnp.float64, dropout=0.0)),
    "fpn": ("fpn", heads.SemanticFPN(9, 8, 6, jnp.float64, dropout=0.0)),
}
LOSS_WEIGHT = {"uper": 1, "aux": 0.4, "fpn": 1}


@pytest.fixture(scope="module")
def golden(data_dir):
    return dict(np.load(data_dir / "segmentation_heads.npz"))


@pytest.fixture
def maps(golden):
    return [golden[f"map{i}"] for i in range(4)]


def state_dict(golden, name):
    """Of a head alone, by the names that the conversion takes."""
    if name != "fpn":
        return {k.removeprefix(f"w/{name}/"): v for k, v in golden.items() if f"w/{name}/" in k}
    parts = {"w/neck/": "neck.", "w/fpn/": "decode_head."}
    return {
        new + k.removeprefix(old): v
        for old, new in parts.items()
        for k, v in golden.items()
        if k.startswith(old)
    }


def variables_of(golden, name):
    return torch_weights.head_from_torch(KINDS[name][0], state_dict(golden, name))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_logits_losses_and_statistics(name, mode, golden, maps):
    head, variables = KINDS[name][1], variables_of(golden, name)
    train = mode == "train"

    @jax.jit
    def run(variables, maps, labels):
        logits, new = head.apply(variables, maps, train=train, mutable=["batch_stats"])
        resized = resize.bilinear(logits, labels.shape[1:])
        loss = LOSS_WEIGHT[name] * segmentation.cross_entropy(resized, labels)
        return logits, loss, segmentation.accuracy(resized, labels), new["batch_stats"]

    logits, loss, accuracy, statistics = run(variables, maps, golden["label"])
    assert_close(
        {"logits": logits, "loss": loss},
        {"logits": golden[f"{mode}/{name}"], "loss": golden[f"{mode}/loss_{name}"]},
        TOLERANCE,
    )
    np.testing.assert_allclose(100 * accuracy, golden[f"{mode}/acc_{name}"][0], rtol=1e-6)
    if train:
        table = Table(HEADS[KINDS[name][0]])
        ours = table.to_torch(variables | {"batch_stats": statistics})
        ours = {f"after/{name}/{k.removeprefix('decode_head.')}": v for k, v in ours.items()}
        after = {k: v for k, v in golden.items() if k.startswith(f"after/{name}/")}
        assert_close(ours, after, TOLERANCE)
        counts = [v for k, v in ours.items() if k.endswith("num_batches_tracked")]
        assert counts and all(count == 1 for count in counts)


@pytest.mark.usefixtures("x64")
def test_neck(golden, maps):
    variables = variables_of(golden, "fpn")
    run = jax.jit(partial(KINDS["fpn"][1].apply, capture_intermediates=True))
    _, captured = run(variables, maps)
    coarsest = captured["intermediates"]["neck"]["__call__"][0][3]
    assert_close({"neck": coarsest}, {"neck": golden["eval/neck3"]}, TOLERANCE)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradients_to_the_maps(mode, golden, maps):
    """Of UPerNet's loss and the auxiliary one."""

    def loss(maps):
        total = 0
        for name in ("uper", "aux"):
            logits, _ = KINDS[name][1].apply(
                variables_of(golden, name), maps, train=mode == "train", mutable=["batch_stats"]
            )
            logits = resize.bilinear(logits, golden["label"].shape[1:])
            total += LOSS_WEIGHT[name] * segmentation.cross_entropy(logits, golden["label"])
        return total

    gradients = jax.jit(jax.grad(loss))(maps)
    ours = {f"{mode}/dmap{i}": gradient for i, gradient in enumerate(gradients)}
    assert_close(ours, {name: golden[name] for name in ours}, TOLERANCE)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [1, 3])
def test_a_sum_of_convolutions_is_that_of_the_concatenation(size):
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(2, 7, 6, c)) for c in (3, 5, 2)]
    make = Layers(jnp.float64, 0)
    module = heads.Convolution(make, 4, size, jax.nn.initializers.normal(1.0), True)
    variables = module.init(jax.random.key(0), *maps)

    def plain(variables, maps):
        return module.apply(variables, jnp.concatenate(maps, axis=-1))

    def summed(variables, maps):
        return module.apply(variables, *maps)

    y, back = jax.vjp(summed, variables, maps)
    expected, expected_back = jax.vjp(plain, variables, maps)
    pairs = [(y, expected), (back(jnp.cos(y)), expected_back(jnp.cos(y)))]
    for a, b in zip(*map(jax.tree.leaves, zip(*pairs, strict=True)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def random_maps(dtype=jnp.float32, batch=2):
    rng = np.random.default_rng(0)
    sizes = ((16, 12, 8), (8, 6, 12), (4, 3, 16), (2, 2, 20))
    return [jnp.asarray(rng.normal(size=(batch, *size)), dtype) for size in sizes]


@pytest.mark.parametrize(
    "head",
    [
        heads.UPerHead(5, 16),
        heads.FCNHead(5, 16),
        pytest.param(heads.SemanticFPN(5, 24, 16), marks=pytest.mark.slow),
    ],
)
def test_initialisation_dropout_and_narrow_types(head):
    maps = random_maps()
    variables = jax.jit(head.init)(jax.random.key(0), maps)
    paths = jax.tree_util.tree_leaves_with_path(variables["params"])
    for path, leaf in paths:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("bias"):
            assert np.all(leaf == 0), name
        elif name.endswith("scale"):
            assert np.all(leaf == 1), name
        elif "conv_seg" in name:
            assert np.std(leaf) == pytest.approx(0.01, rel=0.3)
        elif name.startswith("neck"):  # Xavier's uniform, gain 1
            fans = np.prod(leaf.shape[:-2]) * sum(leaf.shape[-2:])
            bound = (6 / fans) ** 0.5
            assert 0.97 * bound < np.abs(leaf).max() <= bound, name
            assert np.std(leaf) == pytest.approx(bound / 3**0.5, rel=0.1), name
        else:
            fan_out = np.prod(leaf.shape[:-2]) * leaf.shape[-1]
            assert np.std(leaf) == pytest.approx((2 / fan_out) ** 0.5, rel=0.2), name

    exact = jax.jit(head.apply)(variables, maps)
    narrow = jax.jit(head.clone(dtype=jnp.bfloat16).apply)(variables, maps)
    assert narrow.dtype == exact.dtype == jnp.float32
    error = np.linalg.norm(narrow - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.03

    @jax.jit
    def train(rows, key):
        how = dict(train=True, rows=rows, rngs={"dropout": jax.random.key(key)})
        # One image four times: BatchNorm sees the same, whatever the rows.
        same = [jnp.repeat(x[:1], 4, axis=0) for x in maps]
        return head.apply(variables, same, mutable=["batch_stats"], **how)[0]

    first = train(jnp.arange(4), 1)
    np.testing.assert_array_equal(first[2:], train(jnp.asarray([2, 3, 0, 1]), 1)[:2])
    assert not np.allclose(first[0], first[1])
    assert not np.allclose(first, train(jnp.arange(4), 2))
    with pytest.raises(UserError, match="rngs="):
        head.apply(variables, maps, train=True, mutable=["batch_stats"])
    with pytest.raises(UserError, match="four maps"):
        head.apply(variables, maps[:3])


def test_dropout_drops_whole_channels():
    """With a classifier of ones, logits of ones count the channels that are kept."""
    head = heads.FCNHead(1, 200, dropout=0.25)
    maps = random_maps(batch=3)
    variables = head.init(jax.random.key(0), maps)
    params = dict(variables["params"])
    params["convs_0"] = jax.tree.map(jnp.zeros_like, params["convs_0"])
    params["convs_0"]["bn"]["bias"] += 1
    params["conv_seg"] = {"kernel": jnp.ones((200, 1)), "bias": jnp.zeros(1)}
    how = dict(train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
    logits, _ = head.apply(variables | {"params": params}, maps, **how)
    kept = np.asarray(logits[..., 0]) * 0.75
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-3)
    assert np.all(np.ptp(kept, axis=(1, 2)) == 0)  # an image's are dropped at all its pixels
    assert len(np.unique(np.round(kept))) > 1 and np.all(np.abs(kept - 150) < 30)


def test_names_that_do_not_fit_are_listed(golden):
    state = state_dict(golden, "aux")
    state["convs.1.conv.weight"] = state.pop("convs.0.conv.weight")
    with pytest.raises(UserError) as caught:
        torch_weights.head_from_torch("fcn", state)
    assert str(caught.value) == (
        "these are not the weights of a head of kind 'fcn': unexpected: convs.1.conv.weight; "
        "missing: convs.0.conv.weight"
    )
    with pytest.raises(UserError, match="upernet, fcn, fpn, not psp"):
        torch_weights.head_from_torch("psp", state)
