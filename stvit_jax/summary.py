"""Parameters and multiply-accumulates of a network, module by module.

    python -m stvit_jax.summary stvit_small [--image-size 224]
    python -m stvit_jax.summary upernet:stvit_small --image-size 512 2048

MACs are counted as fvcore counts the published code, which is what its table holds: convolutions,
Linear layers and matrix products; and the small terms 3*81*C + 81 per cell for fold and unfold,
2 per BatchNorm input, 5 per LayerNorm input, 1 per input of an average pool. Those of a segmenter
(HEAD:NAME) are without those of norms and pools, as published, and its total is without the
auxiliary head, which is for training only.
"""

import math
from collections.abc import Sequence

import jax

from stvit_jax import command_line
from stvit_jax.console import say
from stvit_jax.errors import UserError
from stvit_jax.models import heads
from stvit_jax.models.segmenter import KINDS, Segmenter, create_segmenter
from stvit_jax.models.settings import abstract
from stvit_jax.models.stvit import STViT, create_model, list_models

Row = tuple[str, int, int]  # module, parameters, MACs
Size = tuple[int, int]  # height, width


def summarize(model: STViT | Segmenter, image_size: int | Size) -> list[Row]:
    """(module, parameters, MACs of one image) of the whole first, then in the order of computing.

    Args:
      model: a network, or a segmenter.
      image_size: pixels: of a square, or height and width.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if isinstance(model, Segmenter):
        return _of_segmenter(model, size)
    params = abstract(model)["params"]
    rows, size = _stem_and_stages(model, params, size, small=1)
    rows.append(("head", _count(params, "proj", "norm", "head"), _head_macs(model, size)))
    return [_total(rows), *rows]


def _of_segmenter(model: Segmenter, size: Size) -> list[Row]:
    params = abstract(model)["params"]
    rows, _ = _stem_and_stages(model.backbone, params["backbone"], size, small=0)
    rows.append(("norms", _count(params, *(f"norm_{i}" for i in range(4))), 0))
    pixels, size = [], _halved(_halved(size))
    for _ in range(4):
        pixels.append(math.prod(size))
        size = _halved(size)
    head = dict(params["decode_head"])
    if "neck" in head:  # as mmsegmentation has it, beside the head
        neck = {"neck": head.pop("neck")}
        rows.append(("neck", _count(neck, "neck"), _neck_macs(model, pixels)))
    macs = _upernet_macs if model.kind == "upernet" else _fpn_macs
    rows.append((model.kind, _count(head, *head), macs(model, pixels)))
    rows.insert(0, _total(rows))
    if "auxiliary_head" in params:
        rows.append(("auxiliary", _count(params, "auxiliary_head"), _auxiliary_macs(model, pixels)))
    return rows


def _total(rows: list[Row]) -> Row:
    return "total", sum(row[1] for row in rows), sum(row[2] for row in rows)


def _count(params: dict, *names: str) -> int:
    return sum(math.prod(leaf.shape) for name in names for leaf in jax.tree.leaves(params[name]))


def _halved(size: Size) -> Size:
    return (size[0] + 1) // 2, (size[1] + 1) // 2  # a 3x3 stride-2 convolution with one zero around


def _stem_and_stages(model: STViT, params: dict, size: Size, small: int) -> tuple[list[Row], Size]:
    """Their rows, and the size of the last map; `small`: 1 with norms and pools, 0 without."""
    rows = [("stem", _count(params, "patch_embed"), _stem_macs(model, size, small))]
    size = _halved(_halved(size))
    for i in range(len(model.depths)):
        macs = _stage_macs(model, i, size, small)
        rows.append((f"stage {i + 1}", _count(params, f"layers_{i}"), macs))
        size = _halved(size) if i + 1 < len(model.depths) else size
    return rows, size


def _stem_macs(model: STViT, size: Size, small: int) -> int:
    c, half = model.in_chans, model.embed_dim[0] // 2
    macs = 0
    for width, stride in ((half, 2), (half, 1), (2 * half, 2), (2 * half, 1)):
        size = _halved(size) if stride == 2 else size
        macs += math.prod(size) * (9 * c * width + small * 2 * width)
        c = width
    return macs


def _stage_macs(model: STViT, i: int, size: Size, small: int) -> int:
    c, n, s = model.embed_dim[i], math.prod(size), model.stoken_size[i]
    hidden = int(c * model.mlp_ratio)
    block = n * 9 * c + small * n * 5 * c  # positional convolution, LayerNorm
    tokens = n
    if s > 1:
        tokens = math.ceil(size[0] / s) * math.ceil(size[1] / s)
        padded = tokens * s * s
        products = 3 + 2 * (model.n_iter[i] - 1)  # association and aggregation; the way back
        block += products * 9 * c * padded + small * padded * c  # and S0's average pool
        block += tokens * (3 * 81 * c + 81)
    block += tokens * 4 * c * c + 2 * tokens**2 * c
    block += small * n * 2 * c + n * (2 * c * hidden + 9 * hidden)  # BatchNorm, conv-FFN
    macs = model.depths[i] * block
    if i + 1 < len(model.depths):
        c_next = model.embed_dim[i + 1]
        macs += math.prod(_halved(size)) * (9 * c * c_next + small * 2 * c_next)
    return macs


def _head_macs(model: STViT, size: Size) -> int:
    c, n = model.projection, math.prod(size)
    return n * (model.embed_dim[-1] * c + 2 * c + c) + c * model.num_classes


def _upernet_macs(model: Segmenter, pixels: list[int]) -> int:
    widths, d = model.backbone.embed_dim, model.channels
    macs = sum(bins**2 * widths[3] * d for bins in heads.POOLS)
    macs += pixels[3] * 9 * (widths[3] + len(heads.POOLS) * d) * d
    macs += sum(n * (c * d + 9 * d * d) for n, c in zip(pixels[:3], widths[:3], strict=True))
    return macs + pixels[0] * (9 * 4 * d * d + d * model.num_classes)


def _neck_macs(model: Segmenter, pixels: list[int]) -> int:
    neck, widths = 2 * model.channels, model.backbone.embed_dim
    return sum(n * (c * neck + 9 * neck * neck) for n, c in zip(pixels, widths, strict=True))


def _fpn_macs(model: Segmenter, pixels: list[int]) -> int:
    d, neck = model.channels, 2 * model.channels
    macs = pixels[0] * d * model.num_classes
    for i, n in enumerate(pixels):
        macs += n * 9 * neck * d
        macs += sum(n * 4**j * 9 * d * d for j in range(1, i))  # each after an enlargement
    return macs


def _auxiliary_macs(model: Segmenter, pixels: list[int]) -> int:
    d = model.channels // 2
    return pixels[2] * (9 * model.backbone.embed_dim[2] * d + d * model.num_classes)


def _named(name: str) -> STViT | Segmenter:
    kind, colon, backbone = name.rpartition(":")
    return create_segmenter(kind, backbone) if colon else create_model(backbone)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = command_line.parser("python -m stvit_jax.summary", __doc__)
    names = ", ".join([*list_models(), *(f"{kind}:NAME" for kind in KINDS)])
    parser.add_argument("name", help=names)
    help_size = "pixels: of a square, or height and width"
    parser.add_argument("--image-size", type=int, nargs="+", default=[224], help=help_size)
    args = parser.parse_args(argv)
    if len(args.image_size) > 2 or min(args.image_size) < 1:
        given = " ".join(map(str, args.image_size))
        raise UserError(f"--image-size is {given}; it must be one or two numbers, at least 1")
    size = (args.image_size[0], args.image_size[-1])
    rows = summarize(_named(args.name), size)
    say(f"{args.name} at {size[0]} x {size[1]}")
    say(f"{'':10}{'parameters':>14}{'MACs':>12}")
    for name, parameters, macs in rows:
        say(f"{name:10}{parameters:>14,}{macs / 1e9:>10.3f} G")


if __name__ == "__main__":
    command_line.entry(main)
