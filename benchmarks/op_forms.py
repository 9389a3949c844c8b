"""The hot operations of the network, each in all its forms: the table of `benchmarks.ops`.

A new form is a function of (stage, *arrays) and a line in `OPS`; those of PyTorch are in
torch_ops.py. All forms of an operation compute the same, which a test holds.

Shapes: B images, H x W pixels, C channels, N tokens, h heads, d channels of a head.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from stvit_jax.models.kernels import kernels_of
from stvit_jax.models.layers import Layers
from stvit_jax.models.stvit import STViT, gelu
from stvit_jax.ops import attention, super_tokens
from stvit_jax.ops.depthwise import depthwise3x3

Shapes = dict[str, tuple[int, ...]]
Form = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What operations of a stage are sized by."""

    number: int  # from 1
    batch: int
    side: int  # H and W of its map
    width: int  # C
    hidden: int  # channels inside the conv-FFN
    next_width: int | None  # of the stage after it
    heads: int
    cell: int  # size of a super token's cell, 1: none
    n_iter: int

    def map(self, channels: int) -> tuple[int, ...]:
        """The shape of a map of this stage."""
        return (self.batch, self.side, self.side, channels)


def stages_of(model: STViT, image_size: int, batch: int) -> list[Stage]:
    """The stages of a network."""
    side, found = -(-image_size // 4), []
    for i, width in enumerate(model.embed_dim):
        after = model.embed_dim[i + 1] if i + 1 < len(model.embed_dim) else None
        sizes = (side, width, int(width * model.mlp_ratio), after)
        found.append(
            Stage(i + 1, batch, *sizes, model.num_heads[i], model.stoken_size[i], model.n_iter[i])
        )
        side = -(-side // 2)
    return found


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation.

    Attributes:
      shapes: of its arguments by name, maps before weights, in a stage; None: the stage has none. A
        map is called x and a 3x3 kernel kernel, which PyTorch keeps in another order.
      forms: by name, the network's own first.
    """

    shapes: Callable[[Stage], Shapes | None]
    forms: Mapping[str, Form]


def _layers(x: jax.Array) -> Layers:
    return Layers(x.dtype, 0)


def _library_depthwise(stage: Stage, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    y = jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
    return x + y + bias.astype(x.dtype)


def _layer_norm(stage: Stage, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return _layers(x).layer_norm("norm1").apply({"params": {"scale": scale, "bias": bias}}, x)


def _batch_norm(stage: Stage, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    c = x.shape[-1]
    running = {"mean": jnp.zeros(c), "var": jnp.ones(c), "count": jnp.zeros((), jnp.int32)}
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": running}
    norm = _layers(x).batch_norm(None)
    return norm.apply(variables, x, train=True, mutable=["batch_stats"])[0]


def _downsample(stage: Stage, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    conv = _layers(x).conv3x3(kernel.shape[-1], 2, name="proj_0")
    return conv.apply({"params": {"kernel": kernel, "bias": bias}}, x)


def _pointwise_gelu(stage: Stage, x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    dense = _layers(x).conv1x1(weight.shape[-1], "fc1")
    return gelu(dense.apply({"params": {"kernel": weight, "bias": bias}}, x))


def _super_tokens(stage: Stage, x: jax.Array) -> jax.Array:
    tokens, association = super_tokens.sample(x, stage.cell, stage.n_iter)
    return super_tokens.spread(tokens, association, stage.side, stage.side)


def _map_and(channels: Callable[[Stage], int], *weights: str) -> Callable[[Stage], Shapes]:
    """Of a map x of so many channels, and weights of as many; a depthwise `kernel` is 3x3."""

    def shapes(stage: Stage) -> Shapes:
        c = channels(stage)
        sizes = {name: (3, 3, 1, c) if name == "kernel" else (c,) for name in weights}
        return {"x": stage.map(c)} | sizes

    return shapes


def _downsample_shapes(stage: Stage) -> Shapes | None:
    if stage.next_width is None:
        return None
    kernel = (3, 3, stage.width, stage.next_width)
    return {"x": stage.map(stage.width), "kernel": kernel, "bias": (stage.next_width,)}


def _pointwise_shapes(stage: Stage) -> Shapes:
    weight = (stage.width, stage.hidden)
    return {"x": stage.map(stage.width), "weight": weight, "bias": (stage.hidden,)}


def _attention_shapes(stage: Stage) -> Shapes:
    tokens = (-(-stage.side // stage.cell)) ** 2
    shape = (stage.batch, tokens, stage.heads, stage.width // stage.heads)
    return {"q": shape, "k": shape, "v": shape}


def _of_gelu(form: Form) -> Form:
    return lambda stage, x, *weights: form(stage, gelu(x), *weights)


_DEPTHWISE: dict[str, Form] = {
    "plain": lambda stage, x, kernel, bias: depthwise3x3(x, kernel, bias),
    "library": _library_depthwise,
}
_WIDTH, _HIDDEN = (lambda stage: stage.width), (lambda stage: stage.hidden)

OPS: dict[str, Op] = {
    "depthwise": Op(_map_and(_WIDTH, "kernel", "bias"), _DEPTHWISE),
    "gelu_depthwise": Op(
        _map_and(_HIDDEN, "kernel", "bias"),
        {name: _of_gelu(form) for name, form in _DEPTHWISE.items()},
    ),
    "layer_norm": Op(_map_and(_WIDTH, "scale", "bias"), {"plain": _layer_norm}),
    "batch_norm": Op(_map_and(_WIDTH, "scale", "bias"), {"plain": _batch_norm}),
    "super_tokens": Op(
        lambda stage: {"x": stage.map(stage.width)} if stage.cell > 1 else None,
        {"plain": _super_tokens},
    ),
    "attention": Op(
        _attention_shapes,
        {
            "plain": lambda stage, q, k, v: attention.plain(q, k, v),
            "jax.nn": lambda stage, q, k, v: jax.nn.dot_product_attention(q, k, v),
        },
    ),
    "downsample": Op(_downsample_shapes, {"plain": _downsample}),
    "pointwise_gelu": Op(_pointwise_shapes, {"plain": _pointwise_gelu}),
}


def _kernel_attention(form: str) -> Form:
    if form == "cudnn":
        return lambda stage, q, k, v: attention.cudnn(q, k, v)

    def of(stage: Stage, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        qkv = jnp.stack([q, k, v], axis=3).reshape(*q.shape[:2], -1)
        return attention.tpu(qkv, stage.heads).reshape(q.shape)

    return of


def forms_of(op: str, dtype: Any) -> dict[str, Form]:
    """The forms of an operation by name, with that of a kernel where JAX's device has one."""
    kernels, forms = kernels_of(dtype), dict(OPS[op].forms)
    if "depthwise" in op and kernels.depthwise != "plain":
        before = (lambda x: jnp.zeros(x.shape[-1])) if "gelu" in op else (lambda x: None)
        forms["kernel"] = lambda stage, x, kernel, bias: depthwise3x3(
            x, kernel, bias, before=before(x), form=kernels.depthwise
        )
    if op == "attention" and kernels.attention != "plain":
        forms["kernel"] = _kernel_attention(kernels.attention)
    return forms


def forward(form: Form, stage: Stage) -> Callable[..., Any]:
    """A function of the arguments and what comes in from behind, which it leaves."""
    return lambda arguments, dy: form(stage, *arguments)


def gradient(form: Form, stage: Stage) -> Callable[..., Any]:
    """A function of the arguments and the gradient of the result: the result, and theirs."""

    def of(arguments: list[jax.Array], dy: jax.Array) -> Any:
        y, back = jax.vjp(lambda *given: form(stage, *given), *arguments)
        return y, back(dy)

    return of
