"""Heads for semantic segmentation: four maps of a backbone to class logits.

UPerNet (arXiv 1807.10221) with its auxiliary head, and Semantic FPN (arXiv 1901.02446), as
mmsegmentation 1.2.2 has them: its modules' names, so that `torch_heads.py` stays a table, its
initialisation, and its numbers. Two departures, neither of which changes them but for rounding:

- A convolution of concatenated maps is the sum of the convolutions of each: the concatenation of
  four maps of 512 channels at stride 4 would be the largest array of the network.
- BatchNorm takes its statistics from the whole batch on all devices (there: SyncBN).

Below float32, convolutions round to the compute dtype, and such sums do after each map. BatchNorm,
resizing, pooling and logits are computed in at least float32.

Shapes: B images, D `channels`, K classes; maps F0 to F3 are (B, H, W, C), of strides 4, 8, 16, 32.
"""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from stvit_jax.errors import UserError
from stvit_jax.models.kernels import PLAIN, Kernels
from stvit_jax.models.layers import Dtype, Layers, kept_rows
from stvit_jax.ops import resize
from stvit_jax.ops.precision import plus, product, wide, wide_einsum

POOLS = (1, 2, 3, 6)  # bins of the pyramid pooling

_kaiming = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # of ReLU
_xavier = nn.initializers.xavier_uniform()


class Convolution(nn.Module):
    """A convolution of `size` 1 or 3, with zeros around, and maybe a bias that starts at 0."""

    make: Layers
    features: int
    size: int
    initial: Callable
    use_bias: bool

    @nn.compact
    def __call__(self, *maps: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) each, as if concatenated by channels, to (B, H, W, features)."""
        make, c = self.make, sum(x.shape[-1] for x in maps)
        shape = (self.size, self.size, c, self.features)
        if self.size == 1:
            shape = shape[2:]
        kernel = self.param("kernel", self.initial, shape, make.param_dtype)
        total, start = None, 0
        for x in maps:
            part = jax.lax.slice_in_dim(kernel, start, start + x.shape[-1], axis=-2)
            if self.size == 1:
                y = product(x, part, make.several_devices)
            else:
                y = jax.lax.conv_general_dilated(
                    x,
                    part.astype(make.dtype),
                    (1, 1),
                    ((1, 1), (1, 1)),
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                )
            total = y if total is None else total + y
            start += x.shape[-1]
        if not self.use_bias:
            return total
        bias = self.param("bias", nn.initializers.zeros, (self.features,), make.param_dtype)
        return plus(total, bias, make.several_devices)


class ConvModule(nn.Module):
    """A convolution without bias, BatchNorm, ReLU; folded, the bias is what BatchNorm adds."""

    make: Layers
    features: int
    size: int

    @nn.compact
    def __call__(self, *maps: jax.Array, train: bool) -> jax.Array:
        """Maps (B, H, W, C) each, as if concatenated by channels, to (B, H, W, features)."""
        how = (self.features, self.size, _kaiming, self.make.folded)
        x = Convolution(self.make, *how, name="conv")(*maps)
        return nn.relu(self.make.batch_norm("bn")(x, train=train))


class ConvSeg(nn.Module):
    """The 1x1 convolution to class logits, in at least float32."""

    make: Layers
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (B, H, W, K) of (B, H, W, D)."""
        init = nn.initializers.normal(0.01)
        shape = (x.shape[-1], self.num_classes)
        kernel = self.param("kernel", init, shape, self.make.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[1:], self.make.param_dtype)
        return wide_einsum("bhwd,dk->bhwk", x, kernel.astype(x.dtype)) + bias


class Head(nn.Module):
    """What all heads have: their layers, what they take, and how they end.

    Fields of every head: `num_classes`, K; `channels`, its width D; `dtype` of computation;
    `dropout`, the rate at which whole channels of an image are dropped before the logits in
    training (rng "dropout"); `kernels`, which names the mesh where several devices share a batch;
    `folded`, which `fold_batch_norm` sets.
    """

    @property
    def make(self) -> Layers:
        """Its layers; BatchNorm is that of the whole batch."""
        return Layers(self.dtype, 0, self.kernels, self.folded)

    def taken(self, maps: Sequence[jax.Array]) -> list[jax.Array]:
        """The four maps in the compute dtype."""
        if len(maps) != 4 or any(x.ndim != 4 for x in maps):
            raise UserError(
                f"a head takes the four maps (B, H, W, C) of model.feature_maps, not "
                f"{[x.shape for x in maps]}"
            )
        return [x.astype(self.dtype) for x in maps]

    def logits(self, x: jax.Array, rows: jax.Array | None, train: bool) -> jax.Array:
        """Class logits of (B, H, W, D), after dropout in training."""
        if train and self.dropout > 0:
            if not (self.has_rng("dropout") or self.has_rng("params")):
                raise UserError(
                    "train=True with dropout draws random numbers: call "
                    "head.apply(..., train=True, rngs={'dropout': key})"
                )
            rows = jnp.arange(x.shape[0]) if rows is None else rows
            keep = jnp.asarray(1 - self.dropout, wide(x.dtype))
            mask = kept_rows(self.make_rng("dropout"), rows, keep, x.shape[-1:])
            x = x * mask.astype(x.dtype)[:, None, None]
        return ConvSeg(self.make, self.num_classes, name="conv_seg")(x)


class UPerHead(Head):
    """UPerNet: pyramid pooling of the coarsest map, then a feature pyramid of `channels`."""

    num_classes: int
    channels: int = 512
    dtype: Dtype = jnp.float32
    dropout: float = 0.1
    kernels: Kernels = PLAIN
    folded: bool = False

    @nn.compact
    def __call__(
        self, maps: Sequence[jax.Array], *, train: bool = False, rows: jax.Array | None = None
    ) -> jax.Array:
        """Class logits at stride 4.

        Args:
          maps: four, (B, H, W, C) each.
          train: batch statistics, which needs mutable "batch_stats", and dropout.
          rows: integers (B,), by which dropout draws, as in `STViT.feature_maps`.

        Returns:
          (B, H, W, K) at the size of F0, at least float32.
        """
        maps = self.taken(maps)
        conv = partial(ConvModule, self.make, self.channels)
        pooled = []
        for i, bins in enumerate(POOLS):
            x = resize.adaptive_average_pool(maps[3], bins)
            x = conv(1, name=f"psp_modules_{i}")(x, train=train)
            pooled.append(resize.bilinear(x, maps[3].shape[1:3]))
        coarsest = conv(3, name="bottleneck")(maps[3], *pooled, train=train)

        levels = [conv(1, name=f"lateral_convs_{i}")(maps[i], train=train) for i in range(3)]
        levels.append(coarsest)
        for i in (3, 2, 1):
            levels[i - 1] += resize.bilinear(levels[i], levels[i - 1].shape[1:3])
        levels = [conv(3, name=f"fpn_convs_{i}")(levels[i], train=train) for i in range(3)]
        levels = [resize.bilinear(x, maps[0].shape[1:3]) for x in (*levels, coarsest)]
        x = conv(3, name="fpn_bottleneck")(*levels, train=train)
        return self.logits(x, rows, train)


class FCNHead(Head):
    """The auxiliary head of UPerNet, for training: one convolution of F2."""

    num_classes: int
    channels: int = 256
    dtype: Dtype = jnp.float32
    dropout: float = 0.1
    kernels: Kernels = PLAIN
    folded: bool = False

    @nn.compact
    def __call__(
        self, maps: Sequence[jax.Array], *, train: bool = False, rows: jax.Array | None = None
    ) -> jax.Array:
        """Class logits (B, H, W, K) at the size of F2, stride 16; arguments as of `UPerHead`."""
        x = ConvModule(self.make, self.channels, 3, name="convs_0")(
            self.taken(maps)[2], train=train
        )
        return self.logits(x, rows, train)


class FPN(nn.Module):
    """The feature pyramid of Semantic FPN: convolutions with biases, and nothing between them."""

    make: Layers
    features: int

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> list[jax.Array]:
        """Four maps (B, H, W, C) to as many of the same sizes, of `features` channels."""
        conv = partial(Convolution, self.make, self.features, initial=_xavier, use_bias=True)
        levels = [conv(1, name=f"lateral_convs_{i}")(x) for i, x in enumerate(maps)]
        for i in (3, 2, 1):
            levels[i - 1] += resize.nearest(levels[i], levels[i - 1].shape[1:3])
        return [conv(3, name=f"fpn_convs_{i}")(x) for i, x in enumerate(levels)]


class SemanticFPN(Head):
    """A feature pyramid of `neck_channels`, whose levels of `channels` are summed at stride 4."""

    num_classes: int
    neck_channels: int = 256
    channels: int = 128
    dtype: Dtype = jnp.float32
    dropout: float = 0.1
    kernels: Kernels = PLAIN
    folded: bool = False

    @nn.compact
    def __call__(
        self, maps: Sequence[jax.Array], *, train: bool = False, rows: jax.Array | None = None
    ) -> jax.Array:
        """Class logits (B, H, W, K) at the size of F0; arguments as of `UPerHead`."""
        levels = FPN(self.make, self.neck_channels, name="neck")(self.taken(maps))
        conv = partial(ConvModule, self.make, self.channels, 3)
        total = conv(name="scale_heads_0_0")(levels[0], train=train)
        for i, x in enumerate(levels[1:], 1):
            for j in range(i):  # of the names, the odd numbers are the enlargements'
                x = conv(name=f"scale_heads_{i}_{2 * j}")(x, train=train)
                x = resize.bilinear(x, (2 * x.shape[1], 2 * x.shape[2]))
            total += resize.bilinear(x, total.shape[1:3])
        return self.logits(total, rows, train)
