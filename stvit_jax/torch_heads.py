"""Names of mmsegmentation's heads (1.2.2), and ours: the tables of `torch_weights.py`."""

from stvit_jax.torch_rules import (
    BATCH_NORM,
    CONV1X1,
    CONV3X3,
    LAYER_NORM,
    Rows,
    placed,
)


def _module(torch: str, ours: str, size: int) -> Rows:
    """A convolution without bias, and its BatchNorm."""
    conv = CONV1X1 if size == 1 else CONV3X3
    return ((f"{torch}.conv", f"{ours}/conv", conv[:1]), (f"{torch}.bn", f"{ours}/bn", BATCH_NORM))


def _modules(torch: str, ours: str, size: int, count: int) -> Rows:
    """Several of them, `#` in the names for the number."""
    names = [(torch.replace("#", str(i)), ours.replace("#", str(i))) for i in range(count)]
    return tuple(row for name in names for row in _module(*name, size))


_CONV_SEG = (("conv_seg", "conv_seg", CONV1X1),)
_SCALE_HEADS = tuple(
    row
    for i, count in enumerate((1, 1, 2, 3))
    for j in range(count)
    for row in _module(f"scale_heads.{i}.{2 * j}", f"scale_heads_{i}_{2 * j}", 3)
)
_NECK = tuple(
    (f"{name}.{i}.conv", f"{name}_{i}", conv)
    for name, conv in (("lateral_convs", CONV1X1), ("fpn_convs", CONV3X3))
    for i in range(4)
)

# Of each head alone, relative to it; Semantic FPN is a neck and a head there, one module here.
HEADS: dict[str, Rows] = {
    "upernet": _CONV_SEG
    + _modules("psp_modules.#.1", "psp_modules_#", 1, 4)
    + _module("bottleneck", "bottleneck", 3)
    + _modules("lateral_convs.#", "lateral_convs_#", 1, 3)
    + _modules("fpn_convs.#", "fpn_convs_#", 3, 3)
    + _module("fpn_bottleneck", "fpn_bottleneck", 3),
    "fcn": _CONV_SEG + _module("convs.0", "convs_0", 3),
    "fpn": placed(_NECK, "neck.", "neck/") + placed(_CONV_SEG + _SCALE_HEADS, "decode_head.", ""),
}

# What follows the backbone of a segmenter, in mmsegmentation's order; and the norms of its maps.
SEGMENTERS: dict[str, Rows] = {
    "upernet": placed(HEADS["upernet"], "decode_head.", "decode_head/")
    + placed(HEADS["fcn"], "auxiliary_head.", "auxiliary_head/"),
    "fpn": placed(HEADS["fpn"], "", "decode_head/"),
}
NORMS: Rows = tuple((f"backbone.norm{i}", f"norm_{i}", LAYER_NORM) for i in range(4))
