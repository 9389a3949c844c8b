"""python -m stvit_jax.visualize --weights PATH IMAGE --output PNG: what a network looks at.

One figure, as in the paper, a row for every stage: the image with a chosen pixel; the super token
that every pixel belongs to, of each block that samples; and of the last block, how much pixels
belong to the chosen pixel's super tokens, and what it attends to, head by head. Everything comes
from what the network computed for the image. PATH is weights of any form that train.py's init_from
takes. FILE may end in .png, .pdf or .svg. Of a segmenter the first row is its answer: the image
under the colours of its classes, and their names.

The image is cut as in an evaluation, for a segmenter resized; with `--image-size HxW` all of it is
resized to that.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from stvit_jax import command_line, figures
from stvit_jax.checkpoints.trained import Trained, load_trained
from stvit_jax.console import say
from stvit_jax.data import decode, pictures
from stvit_jax.data.class_lists import of_network
from stvit_jax.data.normalization import normalize
from stvit_jax.errors import UserError, reason
from stvit_jax.models.settings import backbone
from stvit_jax.models.stvit import STViT
from stvit_jax.ops import association as maps

STRONGEST = 3  # super tokens of the chosen pixel that are shown
LARGEST = 2048  # pixels of a side
MOST_BYTES = 1 << 30  # of the attention of a block
NAMED = 12  # classes, the largest, in a figure
HEAT = "inferno"
_ORDINALS = ("strongest", "second", "third")


@dataclasses.dataclass(frozen=True)
class Block:
    """What one block computed for an image.

    Attributes:
      name: "stage 1, block 2".
      size: height and width of its map.
      association: (hh, ww, s*s, 9), or None where every pixel is a token.
      attention: (heads, N, N), of the last block of a stage; None of the others, where it is large.
    """

    name: str
    size: tuple[int, int]
    association: jax.Array | None
    attention: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture of the figure: a map over the image, values or numbers of super tokens.

    Or a picture of its size in place of the image, uint8; or the names of colours.
    """

    title: str
    heat: np.ndarray | None = None
    tokens: np.ndarray | None = None
    picture: np.ndarray | None = None
    legend: tuple[tuple[str, np.ndarray], ...] | None = None


def look(trained: Trained, image: np.ndarray) -> list[list[Block]]:
    """What the blocks of every stage computed.

    Args:
      trained: a network.
      image: uint8 (H, W, 3).
    """
    network, variables = backbone(trained.model), trained.variables
    if trained.is_segmenter:
        variables = {
            name: tree["backbone"] for name, tree in variables.items() if "backbone" in tree
        }

    def sown(variables: Any, image: jax.Array) -> Any:
        how = {"method": "feature_maps", "mutable": ["intermediates"]}
        sown = network.apply(variables, normalize(image[None]), **how)[1]["intermediates"]
        for i, depth in enumerate(network.depths):
            for j in range(depth - 1):
                del sown[f"layers_{i}"][f"blocks_{j}"]["attn"]["attention"]
        return sown

    of_stages = jax.jit(sown)(variables, image)
    stages = []
    for i, depth in enumerate(network.depths):
        size = _map_size(i, *image.shape[:2])
        blocks = [of_stages[f"layers_{i}"][f"blocks_{j}"]["attn"] for j in range(depth)]
        stages.append(
            [
                Block(
                    f"stage {i + 1}, block {j + 1}",
                    size,
                    block["association"][0][0] if "association" in block else None,
                    block["attention"][0][0] if "attention" in block else None,
                )
                for j, block in enumerate(blocks)
            ]
        )
    return stages


def panels(stages: list[list[Block]], image: np.ndarray, at: tuple[int, int]) -> list[list[Panel]]:
    """The rows of the figure.

    Args:
      stages: what the network computed.
      image: uint8 (H, W, 3).
      at: y and x of a pixel of the image.
    """
    rows = []
    for number, blocks in enumerate(stages):
        sampling = [block for block in blocks if block.association is not None]
        height, width = blocks[0].size
        row = [Panel(f"stage {number + 1}\n{height} x {width} pixels")]
        for block in sampling:
            tokens = np.asarray(maps.hard(block.association, *block.size))
            row.append(Panel(f"super tokens\nof {block.name}", tokens=tokens))
        last = blocks[-1]
        where = _scaled(at, image, last.size)
        if sampling:
            weights = np.asarray(maps.row(last.association, *where))
            strongest = [t for t in np.argsort(-weights)[:STRONGEST] if weights[t] > 0]
            soft = np.asarray(maps.memberships(last.association, np.array(strongest), *last.size))
            row += [
                Panel(f"its {_ORDINALS[n]} super token\nweight {weights[token]:.2f}", soft[n])
                for n, token in enumerate(strongest)
            ]
            heads = maps.attention_of(last.association, last.attention, where, *last.size)
        else:
            heads = last.attention[:, where[0] * width + where[1]].reshape(-1, height, width)
        if height * width > 1:  # one pixel attends to itself
            row += [
                Panel(f"attention\nhead {head + 1}", heat)
                for head, heat in enumerate(np.asarray(heads))
            ]
        if len(row) > 1:
            rows.append(row)
    return rows


def answer(trained: Trained, image: np.ndarray) -> list[Panel]:
    """The first row of a segmenter's figure: the image, its classes over it, their names.

    Args:
      trained: a segmenter.
      image: uint8 (H, W, 3).
    """

    @jax.jit
    def labels(variables: Any, image: jax.Array) -> jax.Array:
        return trained.model.apply(variables, normalize(image[None]))[0].argmax(-1)

    count = trained.model.num_classes
    names, palette = of_network(trained.classes, count)
    label = np.asarray(labels(trained.variables, image))
    shares = np.bincount(label.ravel(), minlength=count) / label.size
    largest = [k for k in np.argsort(-shares, kind="stable")[:NAMED] if shares[k]]
    named = tuple((f"{figures.words(names[k], 24)} {shares[k]:.1%}", palette[k]) for k in largest)
    over = figures.overlay(image, label, palette)
    return [Panel("image"), Panel("classes", picture=over), Panel("", legend=named)]


def draw(rows: list[list[Panel]], image: np.ndarray, at: tuple[int, int]) -> Any:
    """The figure; arguments as of `panels`."""
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    columns = max(len(row) for row in rows)
    height, width = image.shape[:2]
    figure = figures.figure(1.5 * columns, (1.5 * height / width + 0.42) * len(rows))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None] / 255
    for line, row in zip(grid, rows, strict=True):
        for axes, panel in zip(line, row, strict=False):
            axes.set_title(panel.title, fontsize=7)
            if panel.legend is not None:
                patches = [Patch(facecolor=c / 255, label=name) for name, c in panel.legend]
                axes.legend(handles=patches, loc="upper left", fontsize=6, frameon=False)
                continue
            if panel.heat is not None:
                heat = colormaps[HEAT](panel.heat / panel.heat.max())[..., :3]
                shown = 0.7 * _enlarged(heat, image) + 0.3 * _enlarged(grey, image)
            elif panel.tokens is not None:
                shown = _cells(panel.tokens, image)
            else:
                shown = image if panel.picture is None else panel.picture
            axes.imshow(shown, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
            if panel.tokens is None:
                axes.plot(at[1], at[0], "+", color="white", ms=9, mew=3)
                axes.plot(at[1], at[0], "+", color="#d62728", ms=8, mew=1.5)
    return figure


def _cells(numbers: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The image under coloured cells with borders, RGB (H, W, 3) in 0 to 1."""
    from matplotlib import colormaps

    count = numbers.max() + 1
    numbers = _enlarged(numbers, image)
    # Neighbours get colours that lie apart.
    shuffled = np.random.default_rng(0).permutation(count)
    colours = colormaps["turbo"]((shuffled + 0.5) / count)[..., :3]
    shown = 0.4 * colours[numbers] + 0.6 * _enlarged(image / 255, image)
    border = np.zeros(numbers.shape, bool)
    border[:-1] |= numbers[:-1] != numbers[1:]
    border[:, :-1] |= numbers[:, :-1] != numbers[:, 1:]
    shown[border] = 1
    return shown


def _enlarged(values: np.ndarray, image: np.ndarray) -> np.ndarray:
    """A map at the size of the image, or a multiple of it where that is small: by repetition."""
    factor = max(1, 256 // max(image.shape[:2]))
    height, width = (side * factor for side in image.shape[:2])
    rows = np.arange(height) * values.shape[0] // height
    return values[rows[:, None], np.arange(width) * values.shape[1] // width]


def _scaled(at: tuple[int, int], image: np.ndarray, size: tuple[int, int]) -> tuple[int, int]:
    """The pixel of a map where a pixel of the image lies."""
    return tuple(a * n // side for a, n, side in zip(at, size, image.shape[:2], strict=True))


def read_image(path: Path, size: tuple[int, ...], whole: bool = False) -> np.ndarray:
    """The pixels that the network sees, uint8 (H, W, 3).

    Args:
      path: of an image.
      size: (S,) for the crop of an evaluation, or (H, W) for the whole image.
      whole: (S,) is the short side of a whole image, as `pictures.scenes` has it.

    Raises:
      UserError: there is no image.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    try:
        if len(size) == 1 and whole:
            return pictures.whole_scene(data, size[0])[1]
        if len(size) == 1:
            return decode.eval_image(data, size[0])
        pixels = Image.fromarray(decode.decode_rgb(data))
        return np.asarray(pixels.resize(size[::-1], Image.Resampling.BICUBIC))
    except decode.UnreadableImage as error:
        raise UserError(f"{path} is no image that can be read: {error}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = command_line.parser("python -m stvit_jax.visualize", __doc__)
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("--weights", metavar="PATH", required=True)
    parser.add_argument("--ema", action="store_true", help="take the moving average")
    parser.add_argument("--output", metavar="FILE", required=True)
    parser.add_argument("--image-size", metavar="S|HxW", help="the weights' own where left out")
    parser.add_argument("--at", metavar="X,Y", help="the chosen pixel of the cut image")
    known = parser.parse_args(argv)
    output = figures.output("--output", known.output)
    size = _numbers("--image-size", known.image_size, "x", 1, 2)
    at = _numbers("--at", known.at, ",", 2, 2)
    if any(side > LARGEST or side < 1 for side in size):
        raise UserError(f"--image-size {known.image_size}: sides are 1 to {LARGEST} pixels")
    trained = load_trained(known.weights, known.ema, kernels="plain")
    size = size or (trained.image_size,)
    image = read_image(Path(known.image).expanduser(), size, trained.is_segmenter)
    height, width = image.shape[:2]
    if max(height, width) > LARGEST:  # of a segmenter, whose long side follows the short one
        raise UserError(
            f"{known.image} would be seen at {width} x {height} pixels, and sides are at most "
            f"{LARGEST}: give a smaller --image-size, or --image-size HxW"
        )
    if (needed := _attention_bytes(backbone(trained.model), height, width)) > MOST_BYTES:
        raise UserError(
            f"at {width} x {height} pixels the attention of one block takes {needed / 2**30:.1f} "
            f"GiB, more than {MOST_BYTES >> 30}: give a smaller --image-size"
        )
    y, x = at[::-1] or (height // 2, width // 2)
    if not (0 <= y < height and 0 <= x < width):
        raise UserError(f"--at {known.at} is outside of the image of {width} x {height} pixels")
    rows = [answer(trained, image)] if trained.is_segmenter else []
    rows += panels(look(trained, image), image, (y, x))
    figures.save(draw(rows, image, (y, x)), output)
    say(f"{output}: {trained.source} at {width} x {height} pixels, pixel {x},{y}")


def _map_size(stage: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of a stage's map; strides round up."""
    stride = 4 * 2**stage
    return -(-height // stride), -(-width // stride)


def _attention_bytes(network: STViT, height: int, width: int) -> int:
    """Of the largest that `look` keeps, heads x N x N in float32."""
    largest = 0
    for i, (cell, heads) in enumerate(zip(network.stoken_size, network.num_heads, strict=True)):
        tokens = math.prod(-(-side // cell) for side in _map_size(i, height, width))
        largest = max(largest, 4 * heads * tokens**2)
    return largest


def _numbers(flag: str, text: str | None, between: str, least: int, most: int) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = text.split(between)
    if not least <= len(parts) <= most or not all(re.fullmatch(r"\d{1,6}", p) for p in parts):
        form = between.join("NM"[:most])
        raise UserError(f"{flag} {text!r}: write {'N or ' if least == 1 else ''}{form}")
    return tuple(map(int, parts))


if __name__ == "__main__":
    command_line.entry(main)
