"""The network next to the PyTorch peer in float64: module by module, whole, and every gradient."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax.traverse_util import flatten_dict

from benchmarks import torch_stvit
from stvit_jax import torch_weights
from stvit_jax.models.stvit import create_model
from tests.parity import assert_close, assert_gradients_close

pytestmark = pytest.mark.usefixtures("x64")

# Optimising the programs, which run once, takes longer than it saves.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def pair(name: str, **overrides):
    """The peer with random weights and non-trivial statistics, our model, and its variables."""
    torch.manual_seed(0)
    peer = torch_stvit.create_model(name, **overrides).double()
    for key, value in peer.state_dict().items():
        if key.endswith(("running_var", "norm.weight", "norm2.weight")) or "gamma_" in key:
            value.uniform_(0.5, 1.5)
        elif key.endswith(("running_mean", "norm.bias", "norm2.bias", "head.bias")):
            value.normal_(0, 0.1)
        elif key.endswith("num_batches_tracked"):
            value.fill_(1000)
    model = create_model(name, dtype=jnp.float64, **overrides)
    # Copies: training changes the statistics of the peer in place.
    state = {key: value.numpy().copy() for key, value in peer.state_dict().items()}
    return peer, model, torch_weights.from_torch(state)


def tiny_overrides(data_dir, name: str) -> dict:
    return json.loads((data_dir / f"{name}_config.json").read_text())


def inputs(batch: int, height: int, width: int) -> tuple[torch.Tensor, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(batch, height, width, 3))
    return torch.from_numpy(x).permute(0, 3, 1, 2), x


def detached(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def buffers(peer: torch.nn.Module) -> dict[str, np.ndarray]:
    """The running statistics."""
    return detached({k: v for k, v in peer.named_buffers() if "fold" not in k})


def channels_first(x: jax.Array) -> np.ndarray:
    return np.moveaxis(x, -1, 1) if x.ndim == 4 else np.asarray(x)


def our_path(torch_module: str) -> str:
    """Where our network has the module; the peer's attention proper is a module of its own."""
    path = re.sub(r"\.(\d+)", r"_\1", torch_module)
    return path.replace("attn.stoken_refine.", "attn.").replace(".", "/")


def with_bias(path: str, output, params):
    """What the peer's module has of an output of ours whose bias is left to what follows."""
    if path.endswith("mlp2/fc1/__call__"):
        return sum(output)
    if not path.endswith("qkv/__call__"):
        return jax.tree.leaves(output)[0]
    (q, k, v), _ = output
    _, bk, bv = np.moveaxis(
        flatten_dict(params, sep="/")[path.replace("__call__", "bias")].reshape(
            q.shape[2], 3, q.shape[3]
        ),
        1,
        0,
    )
    qkv = jnp.stack([q, k + bk, v + bv], axis=3)
    return qkv.reshape(*qkv.shape[:2], -1)


@pytest.mark.parametrize(
    "train",
    [
        pytest.param(False, id="inference", marks=pytest.mark.slow),
        pytest.param(True, id="training"),
    ],
)
def test_every_module(train, data_dir):
    """Sampling with two iterations, padding of both sides, layer scale: all of it is in here."""
    overrides = tiny_overrides(data_dir, "tiny_iter")
    assert max(overrides["n_iter"]) > 1
    peer, model, variables = pair("stvit_small", **overrides)
    x, ours_x = inputs(2, 72, 56)
    theirs, hooks = {}, []
    for name, module in peer.named_modules():
        # An output of ours has no counterpart of GELU and Identity, nor the peer's of our wrappers.
        skipped = (torch.nn.GELU, torch.nn.Sequential, torch_stvit.DropPath)
        if name and not isinstance(module, skipped):
            record = lambda m, i, out, name=name: theirs.__setitem__(name, out)  # noqa: E731
            hooks.append(module.register_forward_hook(record))
    peer.train(train)
    logits = peer(x)

    apply = partial(
        model.apply,
        train=train,
        capture_intermediates=True,
        mutable=["intermediates", "batch_stats"],
    )
    ours_logits, updated = jax.jit(apply, compiler_options=QUICK)(variables, ours_x)
    flat = {
        path: channels_first(with_bias(path, call, variables["params"]))
        for path, (call, *_) in flatten_dict(updated["intermediates"], sep="/").items()
    }
    compared = {}
    for name, value in theirs.items():
        if not name.endswith((".conv.conv", ".pos_embed.conv", "norm1.norm", "stoken_refine")):
            if name.endswith("qkv"):  # ours are tokens in a row
                value = value.flatten(2).transpose(1, 2)
            compared[f"{our_path(name)}/__call__"] = value
    assert len(compared) == 9 + 3 * 3 + 6 * 11 + 3  # stem, downsampling, blocks, head
    assert_close(flat, detached(compared))
    assert_close({"logits": ours_logits}, detached({"logits": logits}))
    state = torch_weights.to_torch(variables | {"batch_stats": updated["batch_stats"]})
    assert_close(state, buffers(peer))


@pytest.mark.parametrize(
    "name, size",
    [
        ("stvit_small", 224),
        *(
            pytest.param(name, size, marks=pytest.mark.slow)
            for name, size in (
                ("stvit_small", 384),
                ("stvit_base", 224),
                ("stvit_base", 384),
                ("stvit_large", 224),
                ("stvit_large", 384),
            )
        ),
    ],
)
def test_whole_network(name, size):
    peer, model, variables = pair(name)
    x, ours_x = inputs(1, size, size)
    with torch.no_grad():
        maps = peer.eval().feature_maps(x)
        theirs = {str(i): value for i, value in enumerate([*maps, peer.head(peer.pool(maps[-1]))])}

    def outputs(module, images):
        return [*module.feature_maps(images), module(images)]

    apply = jax.jit(lambda v, x: model.apply(v, x, method=outputs), compiler_options=QUICK)
    ours = {str(i): channels_first(x) for i, x in enumerate(apply(variables, ours_x))}
    assert_close(ours, detached(theirs))


@pytest.mark.slow
def test_every_gradient_of_small():
    peer, model, variables = pair("stvit_small")
    x, ours_x = inputs(4, 64, 64)
    labels = np.arange(4)
    loss = F.cross_entropy(peer.train()(x), torch.from_numpy(labels))
    loss.backward()

    def loss_fn(params):
        logits, updated = model.apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            ours_x,
            train=True,
            mutable=["batch_stats"],
        )
        return -jnp.mean(jax.nn.log_softmax(logits)[labels, labels]), updated["batch_stats"]

    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), compiler_options=QUICK)
    (ours_loss, batch_stats), grads = step(variables["params"])
    assert_close({"loss": ours_loss}, detached({"loss": loss}))
    ours = torch_weights.to_torch({"params": grads, "batch_stats": batch_stats})
    theirs = {name: parameter.grad for name, parameter in peer.named_parameters()}
    assert_gradients_close(ours, detached(theirs))
    assert_close(ours, buffers(peer))
    assert len(theirs) == len(jax.tree.leaves(grads))
