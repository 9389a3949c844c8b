"""The leaf layers of STViT: initialisers, BatchNorm per group of images, and `Layers`.

`Layers` is injected once, at the root of the network, and makes every layer of it.

Shapes: B images, H x W pixels, C channels, G groups of b images.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stvit_jax.errors import UserError
from stvit_jax.models.kernels import PLAIN, Kernels
from stvit_jax.ops.depthwise import depthwise3x3
from stvit_jax.ops.layer_norm import layer_norm
from stvit_jax.ops.precision import plus, product, wide

Dtype = Any

EPSILON = 1e-5  # of BatchNorm


def uniform_fan_in(fan_in: int) -> Callable:
    """Initialiser of convolutions, biases included: uniform in +-1/sqrt(fan_in)."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def truncated_normal(key: jax.Array, shape: tuple[int, ...], dtype: Dtype) -> jax.Array:
    """Initialiser of Linear layers: standard deviation 0.02, cut at +-2 absolute."""
    return 0.02 * jax.random.truncated_normal(key, -100.0, 100.0, shape, dtype)


def kept_rows(
    key: jax.Array, rows: jax.Array, keep: jax.Array, shape: tuple[int, ...] = ()
) -> jax.Array:
    """What dropping multiplies with: 0, or 1 / `keep` with probability `keep`.

    Args:
      key: of this layer's draws.
      rows: integers (B,): an image draws by its number, so that a batch in parts draws alike.
      keep: a probability, of a dtype of at least float32.
      shape: of an image's draws.

    Returns:
      (B, *shape), in the dtype of `keep`.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    return jax.vmap(lambda key: jax.random.bernoulli(key, keep, shape))(keys) / keep


def _scale_and_bias(norm: nn.Module, c: int) -> tuple[jax.Array, jax.Array]:
    """The parameters of a norm of `c` channels."""
    scale = norm.param("scale", nn.initializers.ones, (c,), norm.param_dtype)
    return scale, norm.param("bias", nn.initializers.zeros, (c,), norm.param_dtype)


class BatchNorm(nn.Module):
    """BatchNorm as PyTorch computes it, with statistics per group of images.

    Flax's own takes the biased variance into the running statistics and knows no groups. A group
    is `group_size` consecutive images (0: the whole batch); groups that lie within one device need
    no communication to normalise. eps 1e-5, momentum 0.9. `frozen`: training, too, normalises by
    the running statistics and keeps them and the parameters.
    """

    group_size: int
    dtype: Dtype
    param_dtype: Dtype
    frozen: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Normalises (B, H, W, C) by the groups' statistics, or the running ones; dtype `dtype`."""
        c = x.shape[-1]
        scale, bias = _scale_and_bias(self, c)
        mean = self.variable("batch_stats", "mean", jnp.zeros, (c,), self.param_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, (c,), self.param_dtype)
        # PyTorch's num_batches_tracked; nothing reads it, conversion keeps it.
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)

        # Deviations from the running mean: they keep the one-pass variance free of cancellation.
        x = x.astype(wide(x.dtype)) - mean.value
        if self.frozen:
            scale, bias = jax.lax.stop_gradient((scale, bias))
        if self.frozen or not train:
            return (x * (jax.lax.rsqrt(var.value + EPSILON) * scale) + bias).astype(self.dtype)

        groups = x.reshape(-1, self.group_size or x.shape[0], *x.shape[1:])  # (G, b, H, W, C)
        n = math.prod(groups.shape[1:4])
        if n == 1:
            raise UserError(
                "BatchNorm in training needs more than one value a channel: "
                "use a larger group_size, batch_size or image_size"
            )
        group_mean = jnp.mean(groups, axis=(1, 2, 3))  # (G, C), relative to the running mean
        group_var = jnp.mean(jnp.square(groups), axis=(1, 2, 3)) - jnp.square(group_mean)
        group_var = jnp.maximum(group_var, 0)
        if not self.is_initializing():
            unbiased = jnp.mean(group_var, axis=0) * (n / (n - 1))
            mean.value = mean.value + 0.1 * jnp.mean(group_mean, axis=0).astype(mean.value.dtype)
            var.value = 0.9 * var.value + 0.1 * unbiased.astype(var.value.dtype)
            count.value = count.value + 1
        group_mean, group_var = (s[:, None, None, None] for s in (group_mean, group_var))
        y = (groups - group_mean) * (jax.lax.rsqrt(group_var + EPSILON) * scale) + bias
        return y.reshape(x.shape).astype(self.dtype)


class ScaleShift(nn.Module):
    """What a BatchNorm in inference is, its statistics taken into two constants a channel."""

    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Scales and shifts (B, H, W, C); `train` is False."""
        scale, bias = _scale_and_bias(self, x.shape[-1])
        return (x.astype(wide(x.dtype)) * scale + bias).astype(self.dtype)


def folded_away(x: jax.Array, *, train: bool) -> jax.Array:
    """In the place of a BatchNorm that the layer beside it has taken in."""
    return x


class ResidualDepthwise(nn.Module):
    """A biased depthwise 3x3 convolution and its residual.

    `folded`: the centre tap holds the residual.
    """

    param_dtype: Dtype
    kernels: Kernels
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, before: jax.Array | None = None) -> jax.Array:
        """Adds to `x` (B, H, W, C), or to GELU(x + before), its convolution."""
        c = x.shape[-1]
        kernel = self.param("kernel", uniform_fan_in(9), (3, 3, 1, c), self.param_dtype)
        bias = self.param("bias", uniform_fan_in(9), (c,), self.param_dtype)
        how = dict(form=self.kernels.depthwise, mesh=self.kernels.mesh)
        how |= dict(residual=not self.folded, before=before)
        return depthwise3x3(x, kernel, bias, **how)


class Conv1x1(nn.Module):
    """A biased 1x1 convolution; `apart`: its bias is left to what follows."""

    features: int
    dtype: Dtype
    param_dtype: Dtype
    several_devices: bool
    apart: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, before: jax.Array | None = None
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Maps (B, H, W, C) to (B, H, W, features), and apart from that the bias (features,).

        `before` (C,) would have been added to x: what comes of it is in the bias.
        """
        init = uniform_fan_in(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", init, (self.features,), self.param_dtype)
        if before is not None:
            bias = bias + jnp.dot(before, kernel, precision="highest")
        y = product(x, kernel, self.several_devices)
        return (y, bias) if self.apart else plus(y, bias, self.several_devices)


class Conv3x3(nn.Module):
    """A biased 3x3 convolution, padded with one zero on all sides ("SAME": (0, 1) at stride 2)."""

    features: int
    stride: int
    dtype: Dtype
    param_dtype: Dtype
    several_devices: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, H / stride, W / stride, features), sizes rounded up."""
        c = x.shape[-1]
        init = uniform_fan_in(9 * c)
        kernel = self.param("kernel", init, (3, 3, c, self.features), self.param_dtype)
        bias = self.param("bias", init, (self.features,), self.param_dtype)
        y = jax.lax.conv_general_dilated(
            x,
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return plus(y, bias, self.several_devices)


class HeadProjections(nn.Module):
    """The 1x1 convolution to queries, keys and values of h heads.

    Its 3C output channels are laid out per head: [q, k, v] of head 0, then of head 1, ...
    """

    num_heads: int
    use_bias: bool
    dtype: Dtype
    param_dtype: Dtype
    several_devices: bool

    @nn.compact
    def __call__(self, x: jax.Array, apart: bool) -> tuple[Any, jax.Array | None]:
        """Projects (B, N, C) to q, k, v, (B, N, h, C // h) each, or as one (B, N, 3C).

        Apart, they are three products, because splitting the result of one costs a copy of it, and
        only the queries get their bias. That of the keys adds the same to all logits of a query,
        which softmax does not see; that of the values goes through attention, whose weights sum to
        1, as it is: it is returned, (C,), for the caller to add.
        """
        c, h = x.shape[-1], self.num_heads
        init = uniform_fan_in(c)
        kernel = self.param("kernel", init, (c, 3 * c), self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", init, (3 * c,), self.param_dtype)
        if not apart:
            y = product(x, kernel, self.several_devices)
            return (y if bias is None else plus(y, bias, self.several_devices)), None
        kernels = jnp.moveaxis(kernel.reshape(c, h, 3, c // h), 2, 0).reshape(3, c, c)
        q, k, v = (product(x, kernels[i], self.several_devices) for i in range(3))
        if bias is not None:
            bias = jnp.moveaxis(bias.reshape(h, 3, c // h), 1, 0).reshape(3, c)
            q, bias = plus(q, bias[0], self.several_devices), bias[2]
        return tuple(part.reshape(*x.shape[:2], h, c // h) for part in (q, k, v)), bias


class LayerNorm(nn.Module):
    """LayerNorm over the channels, eps 1e-6."""

    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises every pixel of `x` (..., C)."""
        scale, bias = _scale_and_bias(self, x.shape[-1])
        return layer_norm(x, scale, bias)


@dataclasses.dataclass(frozen=True)
class Layers:
    """Makes every layer of one network: dtypes, initialisers and norms are stated here only.

    `name` is that of the layer in the variables; None where the caller's attribute names it.
    `folded`: the layers of the network that `fold.py` makes. `freeze_bn`: see `BatchNorm`.
    """

    dtype: Dtype
    group_size: int
    kernels: Kernels = PLAIN
    folded: bool = False
    freeze_bn: bool = False

    @property
    def param_dtype(self) -> Dtype:
        """That of parameters and statistics: at least float32."""
        return wide(self.dtype)

    @property
    def several_devices(self) -> bool:
        """Whether a batch is shared, and gradients are summed over devices."""
        return self.kernels.mesh is not None

    def conv3x3(self, c_out: int, stride: int, name: str) -> Conv3x3:
        """A biased 3x3 convolution."""
        return Conv3x3(c_out, stride, self.dtype, self.param_dtype, self.several_devices, name=name)

    def conv1x1(self, c_out: int, name: str | None, *, apart: bool = False) -> Conv1x1:
        """A biased 1x1 convolution; `apart`: it hands its bias on."""
        return Conv1x1(c_out, self.dtype, self.param_dtype, self.several_devices, apart, name=name)

    def qkv(self, num_heads: int, use_bias: bool) -> HeadProjections:
        """The projections to queries, keys and values."""
        return HeadProjections(
            num_heads,
            use_bias,
            self.dtype,
            self.param_dtype,
            self.several_devices,
            name="qkv",
        )

    def linear(self, c_out: int, name: str | None) -> nn.Dense:
        """A Linear layer, initialised as one; it computes in at least float32."""
        return nn.Dense(
            c_out,
            dtype=wide(self.dtype),
            param_dtype=self.param_dtype,
            kernel_init=truncated_normal,
            name=name,
        )

    def depthwise(self, name: str) -> ResidualDepthwise:
        """A depthwise 3x3 convolution with its residual."""
        return ResidualDepthwise(self.param_dtype, self.kernels, self.folded, name=name)

    def layer_norm(self, name: str | None) -> LayerNorm:
        """LayerNorm over the channels, eps 1e-6."""
        return LayerNorm(self.param_dtype, name=name)

    def batch_norm(self, name: str | None, foldable: bool = True) -> Callable[..., jax.Array]:
        """BatchNorm per group of images; `foldable`: into the linear layer before or after it."""
        if not self.folded:
            how = (self.group_size, self.dtype, self.param_dtype, self.freeze_bn)
            return BatchNorm(*how, name=name)
        return folded_away if foldable else ScaleShift(self.dtype, self.param_dtype, name=name)
