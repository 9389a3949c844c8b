"""STViT with a head for semantic segmentation: classes of pixels.

As mmsegmentation's encoder and decoder, whose names it has: a LayerNorm on each of the backbone's
four maps, a head of `heads.py`, and for training UPerNet's auxiliary head. What follows the stages
in the classification network (`proj`, `norm`, `head`) is not part of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from stvit_jax.errors import UserError, did_you_mean, listing, one_line
from stvit_jax.models import checks, heads
from stvit_jax.models.kernels import PLAIN
from stvit_jax.models.layers import Layers
from stvit_jax.models.stvit import Rate, STViT, create_model
from stvit_jax.ops import resize

# Each head with its published width, and what makes it of a width; the auxiliary head likewise.
KINDS: dict[str, tuple[int, Callable[..., heads.Head]]] = {
    "upernet": (512, lambda channels, **how: heads.UPerHead(channels=channels, **how)),
    "fpn": (
        128,
        lambda channels, **how: heads.SemanticFPN(
            channels=channels, neck_channels=2 * channels, **how
        ),
    ),
}


class HeadLogits(NamedTuple):
    """What a loss is computed of, at least float32.

    Attributes:
      main: (B, H / 4, W / 4, K), sizes rounded up.
      auxiliary: (B, H / 16, W / 16, K), likewise; None where there is no auxiliary head.
    """

    main: jax.Array
    auxiliary: jax.Array | None


class Segmenter(nn.Module):
    """The network; `create_segmenter` fills its fields.

    `backbone` has the dtype, the kernels and all that concerns it. `kind` is one of `KINDS`,
    `channels` the width of that head: its auxiliary head has half of it, its neck twice as much.
    `dropout` is the rate of both heads.
    """

    backbone: STViT
    kind: str
    num_classes: int
    channels: int
    dropout: float = 0.1

    def setup(self) -> None:
        """Makes the modules."""
        backbone = self.backbone
        kernels = PLAIN if isinstance(backbone.kernels, str) else backbone.kernels
        how = dict(dtype=backbone.dtype, dropout=self.dropout, kernels=kernels)
        how |= dict(num_classes=self.num_classes, folded=backbone.folded)
        make = Layers(backbone.dtype, backbone.group_size, kernels)
        self.norm = [make.layer_norm(None) for _ in backbone.embed_dim]
        self.decode_head = KINDS[self.kind][1](self.channels, **how)
        if self._has_auxiliary:
            self.auxiliary_head = heads.FCNHead(channels=self.channels // 2, **how)

    @property
    def folded(self) -> bool:
        """Whether it is the network for inference that `fold_batch_norm` makes."""
        return self.backbone.folded

    @property
    def _has_auxiliary(self) -> bool:
        return self.kind == "upernet" and not self.folded

    def head_logits(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        drop_path_rate: Rate | None = None,
        rows: jax.Array | None = None,
        auxiliary: bool = False,
    ) -> HeadLogits:
        """The heads' logits, each at its own stride, for the loss; arguments as in `STViT`.

        Dropout draws from the rng "dropout", too. BatchNorm of the heads takes its statistics from
        the whole batch. The auxiliary head is there in training, and in inference where `auxiliary`
        asks for it.
        """
        how = dict(train=train, drop_path_rate=drop_path_rate, rows=rows)
        maps = self.backbone.feature_maps(images, **how)
        maps = [norm(x) for norm, x in zip(self.norm, maps, strict=True)]
        main, other = self.decode_head(maps, train=train, rows=rows), None
        if self._has_auxiliary and (train or auxiliary or self.is_initializing()):
            other = self.auxiliary_head(maps, train=train, rows=rows)
        return HeadLogits(main, other)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Class logits of every pixel, in inference.

        Args:
          images: normalised, (B, H, W, in_chans), of any size.

        Returns:
          (B, H, W, K), at least float32.
        """
        return resize.bilinear(self.head_logits(images).main, images.shape[1:3])


def create_segmenter(
    kind: str,
    backbone: str = "stvit_small",
    num_classes: int = 150,
    channels: int | None = None,
    dropout: float = 0.1,
    **overrides: Any,
) -> Segmenter:
    """A network for semantic segmentation.

    Args:
      kind: of the head: "upernet", or "fpn" for Semantic FPN.
      backbone: one of `list_models()`.
      num_classes: K.
      channels: the width of the head; None: as published.
      dropout: of the heads, in training.
      **overrides: of the backbone, as for `create_model`: `stoken_size`, `drop_path_rate`, ...

    Raises:
      UserError: an unknown head, or as `create_model`.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        hint = did_you_mean(one_line(repr(kind)), map(repr, KINDS))
        raise UserError(f"unknown head {one_line(repr(kind))}; {hint}known: {listing(KINDS)}")
    model = create_model(backbone, **overrides)
    if len(model.embed_dim) != 4:
        raise UserError(
            f"a segmenter's backbone has four stages; this one has {len(model.embed_dim)}"
        )
    own = dict(num_classes=num_classes, dropout=dropout)
    own |= dict(channels=KINDS[kind][0] if channels is None else channels)
    own = {field: checks.setting(field, value) for field, value in own.items()}
    return Segmenter(model, kind, **own)
