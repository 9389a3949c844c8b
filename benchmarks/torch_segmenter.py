"""STViT with UPerNet or Semantic FPN in PyTorch: the peer that tests compare segmenters with.

The modules carry mmsegmentation's names in its order (1.2.2), and compute what its modules compute:
the heads are UPerHead, FCNHead, FPN and FPNHead, the backbone is `torch_stvit.py` without what
follows its stages, and with a LayerNorm on each of its four maps.

    segmenter = create_segmenter("upernet", "stvit_small", num_classes=150)

Maps are (B, C, H, W).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import torch_stvit


def resized(x: Tensor, size: torch.Size | tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Interpolated to a size, pixel centres as they are."""
    return F.interpolate(x, size, mode=mode, align_corners=None if mode == "nearest" else False)


class ConvModule(nn.Module):
    """A convolution without bias, BatchNorm, ReLU."""

    def __init__(self, before: int, after: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, size, padding=size // 2, bias=False)
        self.bn = nn.BatchNorm2d(after)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Head(nn.Module):
    """How every head ends."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.dropout = nn.Dropout2d(dropout)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def logits(self, x: Tensor) -> Tensor:
        """(B, K, H, W) of (B, D, H, W)."""
        return self.conv_seg(self.dropout(x))


class UPerHead(Head):
    """UPerNet's decoder, of four maps with `widths` channels."""

    def __init__(
        self, widths: tuple[int, ...], channels: int, num_classes: int, dropout: float
    ) -> None:
        super().__init__(channels, num_classes, dropout)
        bins = (1, 2, 3, 6)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(k), ConvModule(widths[3], channels, 1)) for k in bins
        )
        self.bottleneck = ConvModule(widths[3] + len(bins) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(c, channels, 1) for c in widths[:3])
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = ConvModule(4 * channels, channels, 3)

    def forward(self, maps: list[Tensor]) -> Tensor:
        size = maps[3].shape[2:]
        pooled = [resized(pool(maps[3]), size) for pool in self.psp_modules]
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=False)]
        levels.append(self.bottleneck(torch.cat([maps[3], *pooled], dim=1)))
        for i in (3, 2, 1):
            levels[i - 1] = levels[i - 1] + resized(levels[i], levels[i - 1].shape[2:])
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=False)]
        outputs = [resized(x, maps[0].shape[2:]) for x in [*outputs, levels[3]]]
        return self.logits(self.fpn_bottleneck(torch.cat(outputs, dim=1)))


class FCNHead(Head):
    """UPerNet's auxiliary head, on the third map."""

    def __init__(
        self, widths: tuple[int, ...], channels: int, num_classes: int, dropout: float
    ) -> None:
        super().__init__(channels, num_classes, dropout)
        self.convs = nn.Sequential(ConvModule(widths[2], channels, 3))

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.logits(self.convs(maps[2]))


class Lateral(nn.Module):
    """A convolution and nothing else, as the neck has them."""

    def __init__(self, before: int, after: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, size, padding=size // 2)
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class FPN(nn.Module):
    """The neck of Semantic FPN."""

    def __init__(self, widths: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(Lateral(c, channels, 1) for c in widths)
        self.fpn_convs = nn.ModuleList(Lateral(channels, channels, 3) for _ in widths)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in (3, 2, 1):
            levels[i - 1] = levels[i - 1] + resized(levels[i], levels[i - 1].shape[2:], "nearest")
        return [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=True)]


class FPNHead(Head):
    """The head of Semantic FPN, on the neck's four maps."""

    def __init__(self, before: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__(channels, num_classes, dropout)
        self.scale_heads = nn.ModuleList([nn.Sequential(ConvModule(before, channels, 3))])
        for count in (1, 2, 3):
            steps = nn.Sequential()
            for j in range(count):
                steps.append(ConvModule(channels if j else before, channels, 3))
                steps.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(steps)

    def forward(self, maps: list[Tensor]) -> Tensor:
        levels = [head(x) for head, x in zip(self.scale_heads, maps, strict=True)]
        total = levels[0]
        for x in levels[1:]:
            total = total + resized(x, total.shape[2:])
        return self.logits(total)


class Backbone(torch_stvit.STViT):
    """The stages, and a LayerNorm on each map; nothing that follows them in classification."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        del self.proj, self.norm, self.head
        for i, width in enumerate(settings["embed_dim"]):
            self.add_module(f"norm{i}", nn.LayerNorm(width, eps=1e-6))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.feature_maps(images)
        norms = [getattr(self, f"norm{i}") for i in range(len(maps))]
        return [
            norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for norm, x in zip(norms, maps, strict=True)
        ]


class Segmenter(nn.Module):
    """Backbone, neck where there is one, head, auxiliary head where there is one."""

    def __init__(
        self, kind: str, backbone: Backbone, num_classes: int, channels: int, dropout: float
    ) -> None:
        super().__init__()
        self.backbone = backbone
        widths = tuple(getattr(backbone, f"norm{i}").weight.numel() for i in range(4))
        self.neck = self.auxiliary_head = None
        if kind == "upernet":
            self.decode_head = UPerHead(widths, channels, num_classes, dropout)
            self.auxiliary_head = FCNHead(widths, channels // 2, num_classes, dropout)
        else:
            self.neck = FPN(widths, 2 * channels)
            self.decode_head = FPNHead(2 * channels, channels, num_classes, dropout)

    def head_logits(self, images: Tensor) -> list[Tensor]:
        """The logits of the head at stride 4 and, where there is one, the auxiliary at 16."""
        maps = self.backbone(images)
        outputs = [self.decode_head(maps if self.neck is None else self.neck(maps))]
        return outputs if self.auxiliary_head is None else [*outputs, self.auxiliary_head(maps)]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H, W) at the images' size, (B, 3, H, W)."""
        return resized(self.head_logits(images)[0], images.shape[2:])


def create_segmenter(
    kind: str,
    backbone: str,
    num_classes: int = 150,
    channels: int | None = None,
    dropout: float = 0.1,
    **overrides: Any,
) -> Segmenter:
    """As `stvit_jax.create_segmenter`, randomly initialised."""
    network = Backbone(**(torch_stvit.VARIANTS[backbone] | overrides))
    width = channels or {"upernet": 512, "fpn": 128}[kind]
    return Segmenter(kind, network, num_classes, width, dropout)
