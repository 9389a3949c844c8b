"""STViT in PyTorch: the peer that tests, benchmarks and the converter's `--verify` compare with.

Vision Transformer with Super Token Sampling, CVPR 2023, arXiv 2211.11167. The modules carry the
published checkpoint's names in the published order, so that a published state dict loads with
`strict=True`. It computes what the published code computes and departs in how, since it stands for
the fastest PyTorch that a user would write:

- Super-token candidates are taken per cell (nine slices of the padded grid, batched matrix
  products, nine shifted adds back); `unfold.weights` and `fold.weights`, which the published code
  convolves with, are only stored.
- It is meant for channels-last memory: LayerNorm and the 1x1 convolutions read the same bytes
  through a permuted view, the latter as matrix products. Attention is PyTorch's fused one.
- Under bf16 autocast the residual stream stays bf16 (autocast alone widens it to float32 in
  LayerNorm and layer scale).

    model = create_model("stvit_small").to(memory_format=torch.channels_last)

Letters in shapes: B images, C channels, H W pixels, s cell size, hh ww cells, P = s * s pixels of a
cell, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VARIANTS: dict[str, dict[str, Any]] = {
    "stvit_small": {
        "embed_dim": (64, 128, 320, 512),
        "depths": (3, 5, 9, 3),
        "num_heads": (1, 2, 5, 8),
    },
    "stvit_base": {
        "embed_dim": (96, 192, 384, 512),
        "depths": (4, 6, 14, 6),
        "num_heads": (2, 3, 6, 8),
        "layerscale": (False, False, True, True),
    },
    "stvit_large": {
        "embed_dim": (96, 192, 448, 640),
        "depths": (4, 7, 19, 8),
        "num_heads": (2, 3, 7, 10),
        "layerscale": (False, False, True, True),
    },
}


class Pointwise(nn.Conv2d):
    """A 1x1 convolution, (B, C, H, W) to (B, C', H, W), computed as one matrix product.

    On channels-last memory both permutes are views, and the bias is added inside the product.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
        return y.permute(0, 3, 1, 2)


class ResidualDepthwise(nn.Module):
    """x + depthwise 3x3 convolution of x, any (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels of (B, C, H, W), without a copy on channels-last memory."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.norm.weight.to(x.dtype), self.norm.bias.to(x.dtype)
        # CUDA's autocast would copy x to float32 and return float32; without it the statistics are
        # float32 all the same.
        with torch.autocast(x.device.type, enabled=False):
            y = F.layer_norm(
                x.permute(0, 2, 3, 1), self.norm.normalized_shape, weight, bias, self.norm.eps
            )
        return y.permute(0, 3, 1, 2)


class DropPath(nn.Module):
    """Zeroes whole samples with probability `rate` in training; every call draws its own mask."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        kept = torch.rand((x.shape[0], 1, 1, 1), device=x.device) < keep
        return x * (kept.to(x.dtype) / keep)


def neighbours(grid: Tensor) -> Tensor:
    """The 3x3 cells around every cell, row-major, zeros outside: (B, hh, ww, C) to (..., 9, C)."""
    hh, ww = grid.shape[1:3]
    padded = F.pad(grid, (0, 0, 1, 1, 1, 1))
    slices = [padded[:, dy : dy + hh, dx : dx + ww] for dy in range(3) for dx in range(3)]
    return torch.stack(slices, dim=3)


def sum_to_cells(parts: Tensor) -> Tensor:
    """The transpose of `neighbours`: (B, hh, ww, 9, C) to (B, hh, ww, C)."""
    hh, ww = parts.shape[1:3]
    # Unbound before slicing: the gradient is then one stack, not nine zero-filled copies of it all.
    padded = F.pad(parts, (0, 0, 0, 0, 1, 1, 1, 1)).unbind(dim=3)
    moved = [part[:, 2 - k // 3 :, 2 - k % 3 :][:, :hh, :ww] for k, part in enumerate(padded)]
    return sum(moved[1:], start=moved[0])


def associate(cells: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of each pixel over its nine candidate tokens, and its sum per token.

    Args:
        cells: pixels by cell, (B, hh, ww, P, C).
        tokens: super tokens, (B, hh, ww, C).

    Returns:
        The association, (B, hh, ww, 9, P), and its column sums, (B, hh, ww, 1). Candidates outside
        the grid keep their share of the softmax and count in no column.
    """
    candidates = neighbours(tokens * tokens.shape[-1] ** -0.5)
    # Nine rows of P rather than P rows of nine: matrix products want long aligned rows.
    association = (candidates @ cells.transpose(-1, -2)).softmax(dim=-2)
    # Autocast leaves the softmax in float32: summed so, then narrowed once for both products.
    column_sums = sum_to_cells(association.sum(dim=-1, keepdim=True))
    return association.to(cells.dtype), column_sums


def aggregate(association: Tensor, column_sums: Tensor, cells: Tensor) -> Tensor:
    """Super tokens, (B, hh, ww, C): the pixels' mean weighted by their association."""
    return sum_to_cells(association @ cells) / (column_sums + 1e-12)


class ConstantKernel(nn.Module):
    """The one-hot 3x3 kernels of the published fold and unfold: in the state dict, never used."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.eye(9).reshape(9, 1, 3, 3))


class Attention(nn.Module):
    """Multi-head self-attention over all positions of (B, C, H, W)."""

    def __init__(self, channels: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Pointwise(channels, 3 * channels, bias=qkv_bias)
        self.proj = Pointwise(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # Output channels of qkv are laid out per head: q k v of head 0, q k v of head 1, ...
        qkv = self.qkv(x).permute(0, 2, 3, 1)
        qkv = qkv.reshape(batch, height * width, self.heads, 3 * channels // self.heads)
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=-1)  # (B, heads, N, head_dim) each
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(y.reshape(batch, height, width, channels).permute(0, 3, 1, 2))


class SuperTokenAttention(nn.Module):
    """Attention among super tokens sampled from (B, C, H, W); among pixels if the cell size is 1.

    The association and its column sums are constants: gradient reaches the pixels only through the
    weighted sum and what follows it.
    """

    def __init__(
        self, channels: int, heads: int, qkv_bias: bool, cell_size: int, n_iter: int
    ) -> None:
        super().__init__()
        self.cell_size = cell_size
        self.n_iter = n_iter
        self.unfold = ConstantKernel()
        self.fold = ConstantKernel()
        self.stoken_refine = Attention(channels, heads, qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        s = self.cell_size
        if s == 1:
            return self.stoken_refine(x)
        batch, channels, height, width = x.shape
        hh, ww = -(-height // s), -(-width // s)
        pixels = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, ww * s - width, 0, hh * s - height))
        cells = pixels.reshape(batch, hh, s, ww, s, channels).transpose(2, 3)
        cells = cells.reshape(batch, hh, ww, s * s, channels)

        constant = cells.detach()
        association, column_sums = associate(constant, constant.mean(dim=3))
        for _ in range(self.n_iter - 1):
            tokens = aggregate(association, column_sums, constant)
            association, column_sums = associate(constant, tokens)

        tokens = aggregate(association, column_sums, cells)
        tokens = self.stoken_refine(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = association.transpose(-1, -2) @ neighbours(tokens)  # (B, hh, ww, P, C)
        y = y.reshape(batch, hh, ww, s, s, channels).transpose(2, 3)
        y = y.reshape(batch, hh * s, ww * s, channels)[:, :height, :width]
        return y.permute(0, 3, 1, 2)


class ConvFFN(nn.Module):
    """1x1 to `hidden` channels, GELU, residual depthwise 3x3, 1x1 back."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Pointwise(channels, hidden)
        self.fc2 = Pointwise(hidden, channels)
        self.conv = ResidualDepthwise(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.conv(F.gelu(self.fc1(x))))


class Block(nn.Module):
    """Positional convolution, super token attention, convolutional feed-forward network.

    `layer_scale` is the initial value of gamma_1 and gamma_2, None where the stage has none.
    """

    def __init__(
        self,
        channels: int,
        attention: SuperTokenAttention,
        mlp_ratio: float,
        layer_scale: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.gamma_1 = self.gamma_2 = None
        if layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((1, channels, 1, 1), layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((1, channels, 1, 1), layer_scale))
        self.pos_embed = ResidualDepthwise(channels)
        self.norm1 = ChannelLayerNorm(channels)
        self.attn = attention
        self.norm2 = nn.BatchNorm2d(channels)
        self.mlp2 = ConvFFN(channels, int(channels * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x)
        x = x + self.drop_path(scale(self.gamma_1, self.attn(self.norm1(x))))
        return x + self.drop_path(scale(self.gamma_2, self.mlp2(self.norm2(x))))


def scale(gamma: Tensor | None, x: Tensor) -> Tensor:
    """Gamma * x in the dtype of x, or x where there is no layer scale."""
    return x if gamma is None else gamma.to(x.dtype) * x


class Stem(nn.Module):
    """Four 3x3 convolutions, each followed by GELU and then BatchNorm; stride 4 in all."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        shapes = (
            (in_channels, half, 2),
            (half, half, 1),
            (half, channels, 2),
            (channels, channels, 1),
        )
        self.proj = nn.Sequential()
        for before, after, stride in shapes:
            self.proj.append(nn.Conv2d(before, after, 3, stride, padding=1))
            self.proj.append(nn.GELU())
            self.proj.append(nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Downsample(nn.Module):
    """3x3 stride-2 convolution and BatchNorm."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        conv = nn.Conv2d(before, after, 3, stride=2, padding=1)
        self.proj = nn.Sequential(conv, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Stage(nn.Module):
    """Blocks of one width; the network applies `downsample` after it took the feature map."""

    def __init__(self, blocks: list[Block], downsample: Downsample | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample


class STViT(nn.Module):
    """The network. Arguments have the published names; sequences hold one entry per stage."""

    def __init__(
        self,
        *,
        embed_dim: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        layerscale: Sequence[bool] = (False, False, False, False),
        n_iter: Sequence[int] = (1, 1, 1, 1),
        stoken_size: Sequence[int] = (8, 4, 1, 1),
        mlp_ratio: float = 4,
        qkv_bias: bool = True,
        projection: int = 1024,
        init_values: float = 1e-6,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.patch_embed = Stem(in_chans, embed_dim[0])
        # The rate grows linearly from 0 in the first block to drop_path_rate in the last.
        rates = iter(drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))
        self.layers = nn.ModuleList()
        for i, width in enumerate(embed_dim):
            blocks = [
                Block(
                    width,
                    SuperTokenAttention(width, num_heads[i], qkv_bias, stoken_size[i], n_iter[i]),
                    mlp_ratio,
                    init_values if layerscale[i] else None,
                    next(rates),
                )
                for _ in range(depths[i])
            ]
            last = i == len(embed_dim) - 1
            self.layers.append(Stage(blocks, None if last else Downsample(width, embed_dim[i + 1])))
        self.proj = Pointwise(embed_dim[-1], projection)
        self.norm = nn.BatchNorm2d(projection)
        self.head = nn.Linear(projection, num_classes) if num_classes else nn.Identity()
        # PyTorch's own initialisation of convolutions and norms is the published one.
        if num_classes:
            nn.init.trunc_normal_(self.head.weight, std=0.02, a=-2.0, b=2.0)
            nn.init.zeros_(self.head.bias)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Maps (B, C, H, W) at the end of each stage, before downsampling: strides 4 8 16 32."""
        maps = []
        x = self.patch_embed(images)
        for stage in self.layers:
            x = stage.blocks(x)
            maps.append(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

    def pool(self, x: Tensor) -> Tensor:
        """The vectors that enter `head`, (B, projection), from the last stage's map."""
        return F.silu(self.norm(self.proj(x))).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (B, num_classes), of normalised images, (B, 3, H, W)."""
        return self.head(self.pool(self.feature_maps(images)[-1]))


def create_model(name: str, **overrides: Any) -> STViT:
    """The variant `name` of `VARIANTS`, randomly initialised; overrides by the published names."""
    return STViT(**(VARIANTS[name] | overrides))


def adamw_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The two published parameter groups for `torch.optim.AdamW`: with decay, without.

    No decay for tensors of one dimension and names ending in `.bias`; layer scale (4-D) decays.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (no_decay if parameter.ndim == 1 or name.endswith(".bias") else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
