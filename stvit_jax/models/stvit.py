"""STViT in Flax Linen, leaf to root, and the table of its variants.

Vision Transformer with Super Token Sampling, CVPR 2023, arXiv 2211.11167 (there: SViT-S/B/L). The
mathematics of sampling is in `ops/super_tokens.py`, the leaf layers are in `layers.py`, and what
users may give is in `checks.py`. Modules are named after the published checkpoint, so that
`torch_weights.py` stays a table.

Departures from the published code, none of which changes a number of one device in float32:
- BatchNorm can take its statistics per group of `group_size` images, which puts a group in the
  place of a device of the published multi-GPU training; running statistics then take the mean
  over all groups (published: device 0's only).
- Under bfloat16, parameters, statistics, softmax and logits are float32.

Shapes: B images, H x W pixels of the map at hand, C channels, N = H*W, h heads, d = C // h.
Every 3x3 convolution pads one zero on all four sides.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stvit_jax.errors import UserError, did_you_mean, kind_of, listing, one_line
from stvit_jax.models import checks
from stvit_jax.models.kernels import PLAIN, Kernels, kernels_of
from stvit_jax.models.layers import Dtype, Layers, kept_rows
from stvit_jax.ops import attention, super_tokens
from stvit_jax.ops.gelu import gelu
from stvit_jax.ops.precision import wide

Rate = float | jax.Array

VARIANTS: dict[str, dict[str, Any]] = {
    "stvit_small": dict(embed_dim=(64, 128, 320, 512), depths=(3, 5, 9, 3), num_heads=(1, 2, 5, 8)),
    "stvit_base": dict(
        embed_dim=(96, 192, 384, 512),
        depths=(4, 6, 14, 6),
        num_heads=(2, 3, 6, 8),
        layerscale=(False, False, True, True),
    ),
    "stvit_large": dict(
        embed_dim=(96, 192, 448, 640),
        depths=(4, 7, 19, 8),
        num_heads=(2, 3, 7, 10),
        layerscale=(False, False, True, True),
    ),
    # This project's own, for demos and tests at 32x32: grids of 2x2 cells in stages 1 and 2.
    "stvit_tiny": dict(
        embed_dim=(32, 64, 128, 160),
        depths=(1, 2, 2, 1),
        num_heads=(1, 2, 4, 5),
        stoken_size=(4, 2, 1, 1),
        projection=256,
        num_classes=10,
    ),
}


class PatchEmbed(nn.Module):
    """The stem: four times conv, GELU, BatchNorm (in this order); stride 4."""

    make: Layers
    dim: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Embeds images (B, H, W, channels) as (B, H/4, W/4, dim), sizes rounded up."""
        for i, (width, stride) in enumerate(
            ((self.dim // 2, 2), (self.dim // 2, 1), (self.dim, 2), (self.dim, 1))
        ):
            x = gelu(self.make.conv3x3(width, stride, name=f"proj_{3 * i}")(x))
            # Its shift meets the zeros that the next convolution pads, so that cannot take it in.
            norm = self.make.batch_norm(f"proj_{3 * i + 2}", foldable=False)
            x = norm(x, train=train)
        return x


class Downsample(nn.Module):
    """Between stages: 3x3 stride-2 convolution and BatchNorm, no activation."""

    make: Layers
    dim: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Takes (B, H, W, C) to (B, H/2, W/2, dim), sizes rounded up."""
        x = self.make.conv3x3(self.dim, 2, name="proj_0")(x)
        return self.make.batch_norm(name="proj_1")(x, train=train)


class SuperTokenAttention(nn.Module):
    """Self-attention on super tokens, or on all pixels where the cell size is 1.

    Sows `association` (B, hh, ww, s*s, 9), where it samples, and `attention` (B, h, N, N).
    """

    make: Layers
    num_heads: int
    n_iter: int
    stoken_size: int
    qkv_bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Attends within the map `x` (B, H, W, C)."""
        if self.stoken_size == 1:
            return self.attend(x)
        _, height, width, _ = x.shape
        tokens, association = super_tokens.sample(x, self.stoken_size, self.n_iter)
        self.sow("intermediates", "association", association)
        return super_tokens.spread(self.attend(tokens), association, height, width)

    def attend(self, x: jax.Array) -> jax.Array:
        """Multi-head self-attention of all tokens of `x` (B, H, W, C)."""
        b, height, width, c = x.shape
        x = x.reshape(b, height * width, c)
        wanted = self.is_mutable_collection("intermediates")  # then attention itself is computed
        form = "plain" if wanted else self.make.kernels.attention
        projections = self.make.qkv(self.num_heads, self.qkv_bias)
        if form == "pallas_tpu" and attention.tpu_takes(x, self.num_heads):
            qkv, bias = projections(x, apart=False)
            y = attention.tpu(qkv, self.num_heads, self.make.kernels.mesh)
        else:
            by_cudnn = form == "cudnn" and attention.cudnn_takes(x, self.num_heads)
            (q, k, v), bias = projections(x, apart=True)
            if wanted:
                weights = attention.weights(q, k)
                self.sow("intermediates", "attention", weights)
                y = attention.attended(weights, v)
            elif by_cudnn and self.stoken_size == 1:
                y = attention.cudnn(q, k, v)
            else:
                y = attention.plain(q, k, v)
        return self.make.conv1x1(c, "proj")(y.reshape(b, height, width, c), bias)


class ConvFFN(nn.Module):
    """1x1 to `hidden`, GELU, h + depthwise(h), 1x1 back."""

    make: Layers
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to the same shape."""
        c = x.shape[-1]
        x = self.make.depthwise("conv")(*self.make.conv1x1(self.hidden, "fc1", apart=True)(x))
        return self.make.conv1x1(c, "fc2")(x)


class Block(nn.Module):
    """Positional convolution, super token attention, conv-FFN, each with its residual."""

    make: Layers
    num_heads: int
    n_iter: int
    stoken_size: int
    mlp_ratio: float
    qkv_bias: bool
    layerscale: bool
    init_values: float

    @nn.compact
    def __call__(
        self, x: jax.Array, rows: jax.Array, drop_path_rate: Rate, *, train: bool
    ) -> jax.Array:
        """Maps (B, H, W, C) to the same shape; both branches have the one rate."""
        c = x.shape[-1]
        x = self.make.depthwise("pos_embed")(x)
        y = SuperTokenAttention(
            self.make, self.num_heads, self.n_iter, self.stoken_size, self.qkv_bias, name="attn"
        )(self.make.layer_norm("norm1")(x))
        x = x + self.drop_path(self.scale(y, "gamma_1"), rows, drop_path_rate, train)
        y = self.make.batch_norm("norm2")(x, train=train)
        y = ConvFFN(self.make, int(c * self.mlp_ratio), name="mlp2")(y)
        return x + self.drop_path(self.scale(y, "gamma_2"), rows, drop_path_rate, train)

    def scale(self, y: jax.Array, name: str) -> jax.Array:
        """Layer scale by the parameter `name`, where the stage has it."""
        if not self.layerscale or self.make.folded:
            return y
        init = nn.initializers.constant(self.init_values)
        gamma = self.param(name, init, y.shape[-1:], self.make.param_dtype)
        return y * gamma.astype(y.dtype)

    def drop_path(self, y: jax.Array, rows: jax.Array, rate: Rate, train: bool) -> jax.Array:
        """Drops the branch of a sample with probability `rate`; a new mask at every call.

        A sample's draw is keyed by its number in `rows` (B,), so that a batch in parts draws alike.
        """
        if not train or (isinstance(rate, (int, float)) and rate == 0):
            return y
        keep = 1 - jnp.asarray(rate, wide(y.dtype))
        mask = kept_rows(self.make_rng("dropout"), rows, keep)
        return y * mask.astype(y.dtype)[:, None, None, None]


class Stage(nn.Module):
    """The blocks of one width, and the way to the next stage."""

    make: Layers
    depth: int
    first_block: int  # position among the network's `num_blocks`; sets drop-path rates
    num_blocks: int
    next_dim: int | None
    remat: bool  # whether blocks are computed again in the backward pass
    block: Mapping[str, Any]  # keyword arguments of Block

    @nn.compact
    def __call__(
        self, x: jax.Array, rows: jax.Array, drop_path_rate: Rate, *, train: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """The map before downsampling, (B, H, W, C), and the next stage's input (None: no next)."""
        for i in range(self.depth):
            position = (self.first_block + i) / max(self.num_blocks - 1, 1)
            rate = drop_path_rate * position if position else 0.0
            # `nn.remat` traces arguments: `train`, and a rate of 0, which draws nothing, are none.
            call = partial(Block.__call__, rows=rows, drop_path_rate=rate, train=train)
            if self.remat and not self.is_initializing():
                call = nn.remat(call)
            x = call(Block(self.make, **self.block, name=f"blocks_{i}"), x)
        if self.next_dim is None:
            return x, None
        return x, Downsample(self.make, self.next_dim, name="downsample")(x, train=train)


class STViT(nn.Module):
    """The network. Fields carry the published names; `create_model` fills them from `VARIANTS`.

    `dtype` is the compute dtype; parameters are float32, or float64 with it. `group_size` is the
    number of images that share BatchNorm statistics in training (0: the whole batch). The blocks of
    the stages `remat` are computed again in the backward pass, which takes less memory. `kernels`:
    "auto" takes those of JAX's default device, "plain" XLA's alone. `freeze_bn`: training, too,
    uses the running statistics of BatchNorm, and keeps them and its parameters. With `num_classes`
    0 there is no classifier, and the network gives the pooled vector; with `features_only` there is
    nothing after the stages, and it gives their maps. `folded` is the network for inference that
    `fold_batch_norm` makes, and is set by nothing else.
    """

    embed_dim: Sequence[int]
    depths: Sequence[int]
    num_heads: Sequence[int]
    n_iter: Sequence[int] = (1, 1, 1, 1)
    stoken_size: Sequence[int] = (8, 4, 1, 1)
    mlp_ratio: float = 4
    qkv_bias: bool = True
    projection: int = 1024
    layerscale: Sequence[bool] = (False, False, False, False)
    init_values: float = 1e-6
    drop_path_rate: float = 0.0
    num_classes: int = 1000
    in_chans: int = 3
    dtype: Dtype = jnp.float32
    group_size: int = 0
    remat: Sequence[int] = ()
    kernels: str | Kernels = "auto"
    features_only: bool = False
    freeze_bn: bool = False
    folded: bool = False

    def setup(self) -> None:
        """Makes the modules; their names are those of the published checkpoint."""
        kernels = self.kernels
        if isinstance(kernels, str):
            kernels = PLAIN if kernels == "plain" else kernels_of(self.dtype)
        make = Layers(self.dtype, self.group_size, kernels, self.folded, self.freeze_bn)
        self.patch_embed = PatchEmbed(make, self.embed_dim[0])
        self.layers = [
            Stage(
                make,
                depth=self.depths[i],
                first_block=sum(self.depths[:i]),
                num_blocks=sum(self.depths),
                next_dim=self.embed_dim[i + 1] if i + 1 < len(self.depths) else None,
                remat=i in self.remat,
                block=dict(
                    num_heads=self.num_heads[i],
                    n_iter=self.n_iter[i],
                    stoken_size=self.stoken_size[i],
                    mlp_ratio=self.mlp_ratio,
                    qkv_bias=self.qkv_bias,
                    layerscale=self.layerscale[i],
                    init_values=self.init_values,
                ),
            )
            for i in range(len(self.depths))
        ]
        if not self.features_only:
            self.proj = make.conv1x1(self.projection, None)
            self.norm = make.batch_norm(None)
            if self.num_classes:
                self.head = make.linear(self.num_classes, None)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Of each of the `feature_maps`: channels, stride and stage, with timm's keys."""
        return [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"layers_{i}"}
            for i, dim in enumerate(self.embed_dim)
        ]

    def feature_maps(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        drop_path_rate: Rate | None = None,
        rows: jax.Array | None = None,
    ) -> list[jax.Array]:
        """The feature pyramid for dense tasks.

        Args:
          images: normalised, (B, H, W, in_chans).
          train: batch statistics and drop path (rng "dropout"); needs mutable "batch_stats".
          drop_path_rate: replaces the field; may be traced, so that a schedule needs no recompile.
          rows: integers (B,), by which drop path draws; None: 0, 1, .... The parts of a batch, each
            with its own rows, draw what the whole draws.

        Returns:
          The four maps at the end of each stage, before downsampling: strides 4, 8, 16, 32.

        Raises:
          UserError: images, variables or a way to call that the network cannot take.
        """
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        checks.call_fits(self, images, train=train, drop_path_rate=rate)
        x = self.patch_embed(images.astype(self.dtype), train=train)
        rows = jnp.arange(images.shape[0]) if rows is None else rows
        maps = []
        for stage in self.layers:
            features, x = stage(x, rows, rate, train=train)
            maps.append(features)
        return maps

    def features(self, images: jax.Array, *, train: bool = False, **how: Any) -> jax.Array:
        """The pooled vector that enters the classifier, (B, projection), at least float32.

        Arguments and errors as in `feature_maps`; a network with `features_only` has none.
        """
        if self.features_only:
            raise UserError("a network with features_only has no pooled vector: leave that out")
        x = self.feature_maps(images, train=train, **how)[-1]
        x = jax.nn.silu(self.norm(self.proj(x), train=train))
        return jnp.mean(x, axis=(1, 2), dtype=wide(self.dtype))

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        drop_path_rate: Rate | None = None,
        rows: jax.Array | None = None,
    ) -> jax.Array | list[jax.Array]:
        """Class logits, (B, num_classes), at least float32; arguments as in `feature_maps`.

        With `num_classes` 0 the `features`, with `features_only` the `feature_maps`.
        """
        how = dict(train=train, drop_path_rate=drop_path_rate, rows=rows)
        if self.features_only:
            return self.feature_maps(images, **how)
        pooled = self.features(images, **how)
        return self.head(pooled) if self.num_classes else pooled


def list_models() -> list[str]:
    """The names that `create_model` takes."""
    return sorted(VARIANTS)


def create_model(name: str, **overrides: Any) -> STViT:
    """The network of a variant.

    Args:
      name: one of `list_models()`.
      **overrides: fields of `STViT`, by the published names; numbers may be NumPy's, and what is
        stated per stage any sequence.

    Raises:
      UserError: an unknown name or field, a value that a field cannot have, or fields that do not
        fit together.
    """
    if not isinstance(name, str):
        raise UserError(f"a model's name is {kind_of(name)}; known: {listing(list_models())}")
    if name not in VARIANTS:
        hint = did_you_mean(repr(name), map(repr, VARIANTS))
        raise UserError(f"unknown model {one_line(name)!r}; {hint}known: {listing(list_models())}")
    fields = {f.name for f in dataclasses.fields(STViT)} - {"parent", "name", "folded"}
    for field in overrides:
        if field not in fields:
            hint = did_you_mean(repr(field), map(repr, fields))
            known = listing(sorted(fields), 20)
            raise UserError(f"unknown model setting {field!r}; {hint}known: {known}")
    settings = VARIANTS[name] | overrides
    model = STViT(**{field: checks.setting(field, value) for field, value in settings.items()})
    checks.settings_fit(model)
    return model
