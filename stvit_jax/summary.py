"""Parameters and multiply-accumulates of a network, module by module.

    python -m stvit_jax.summary stvit_small [--image-size 224]

MACs are counted as fvcore counts the published code, which is what its table holds: convolutions,
Linear layers and matrix products; and the small terms 3*81*C + 81 per cell for fold and unfold,
2 per BatchNorm input, 5 per LayerNorm input, 1 per input of an average pool.
"""

import math
from collections.abc import Sequence

import jax

from stvit_jax import command_line
from stvit_jax.console import say
from stvit_jax.errors import UserError
from stvit_jax.models.settings import abstract
from stvit_jax.models.stvit import STViT, create_model, list_models

Row = tuple[str, int, int]  # module, parameters, MACs


def summarize(model: STViT, image_size: int) -> list[Row]:
    """(module, parameters, MACs of one image) of the whole first, then stem, stages, head."""
    params = abstract(model)["params"]

    def size(*names: str) -> int:
        return sum(
            math.prod(leaf.shape) for name in names for leaf in jax.tree.leaves(params[name])
        )

    rows = [("stem", size("patch_embed"), _stem_macs(model, image_size))]
    side = _halved(_halved(image_size))
    for i in range(len(model.depths)):
        rows.append((f"stage {i + 1}", size(f"layers_{i}"), _stage_macs(model, i, side)))
        side = _halved(side) if i + 1 < len(model.depths) else side
    rows.append(("head", size("proj", "norm", "head"), _head_macs(model, side)))
    return [("total", sum(r[1] for r in rows), sum(r[2] for r in rows)), *rows]


def _halved(side: int) -> int:
    return (side + 1) // 2  # a 3x3 stride-2 convolution with one zero around


def _stem_macs(model: STViT, image_size: int) -> int:
    c, half, side = model.in_chans, model.embed_dim[0] // 2, image_size
    macs = 0
    for width, stride in ((half, 2), (half, 1), (2 * half, 2), (2 * half, 1)):
        side = _halved(side) if stride == 2 else side
        macs += side**2 * (9 * c * width + 2 * width)
        c = width
    return macs


def _stage_macs(model: STViT, i: int, side: int) -> int:
    c, n, s = model.embed_dim[i], side**2, model.stoken_size[i]
    hidden = int(c * model.mlp_ratio)
    block = n * 9 * c + n * 5 * c  # positional convolution, LayerNorm
    tokens = n
    if s > 1:
        tokens = math.ceil(side / s) ** 2
        padded = tokens * s * s
        products = 3 + 2 * (model.n_iter[i] - 1)  # association and aggregation; the way back
        block += products * 9 * c * padded + padded * c  # and S0's average pool
        block += tokens * (3 * 81 * c + 81)
    block += tokens * 4 * c * c + 2 * tokens**2 * c
    block += n * 2 * c + n * (2 * c * hidden + 9 * hidden)  # BatchNorm, conv-FFN
    macs = model.depths[i] * block
    if i + 1 < len(model.depths):
        c_next = model.embed_dim[i + 1]
        macs += _halved(side) ** 2 * (9 * c * c_next + 2 * c_next)
    return macs


def _head_macs(model: STViT, side: int) -> int:
    c, n = model.projection, side**2
    return n * (model.embed_dim[-1] * c + 2 * c + c) + c * model.num_classes


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = command_line.parser("python -m stvit_jax.summary", __doc__)
    parser.add_argument("name", help=", ".join(list_models()))
    parser.add_argument("--image-size", type=int, default=224, help="pixels, square")
    args = parser.parse_args(argv)
    if args.image_size < 1:
        raise UserError(f"--image-size is {args.image_size}; it must be at least 1")
    rows = summarize(create_model(args.name), args.image_size)
    say(f"{args.name} at {args.image_size} x {args.image_size}")
    say(f"{'':10}{'parameters':>14}{'MACs':>12}")
    for name, parameters, macs in rows:
        say(f"{name:10}{parameters:>14,}{macs / 1e9:>10.3f} G")


if __name__ == "__main__":
    command_line.entry(main)
