"""python -m stvit_jax.contact_sheet CONFIG --output PNG: what training sees, as one picture.

CONFIG is written as for train.py, and `--config.FIELD=VALUE` overrides work here, too. The pictures
come through the real loader and the real task of a small batch's first step: three groups of six
images. A row is one slot of each group, so with repeated augmentation its three pairs are three
copies of one image; a pair is the image as the host cut it, and after the device augmentation, with
the labels it is trained on.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from stvit_jax import command_line, tasks
from stvit_jax.console import say
from stvit_jax.data.loader import train_batches
from stvit_jax.data.order import Order
from stvit_jax.errors import UserError, reason
from stvit_jax.following import as_weights_have_it
from stvit_jax.training.task import Picture, step_keys
from stvit_jax.validation import validate

GROUPS, GROUP_SIZE = 3, 6
TILE = 160  # pixels of a picture's side on the sheet
GAP = 6
LINE = 15  # height of a line of text


def contact_sheet(config: ConfigDict) -> Image.Image:
    """The sheet of the first batch of a config, of GROUPS x GROUP_SIZE images.

    Raises:
      UserError: a mistake in the config or the data.
    """
    count = GROUPS * GROUP_SIZE
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.batch_size, config.group_size, config.eval_only = count, GROUP_SIZE, False
        config.gradient_accumulation = 1
    validate(config)
    config = as_weights_have_it(config, None)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
    task = tasks.build(config, mesh)
    order = Order(len(task.train.source), count, GROUP_SIZE, config.data.repeats, seed=config.seed)
    with contextlib.closing(train_batches(task.train, order)) as batches:
        batch = next(batches)
    key, _ = step_keys(jax.random.key(config.seed), 0)
    return _draw(task.sheet(batch, key))


def _draw(pairs: list[list[Picture]]) -> Image.Image:
    """Rows of slots, a pair of pictures (before, after) of each group."""
    pair = 2 * TILE + 2 * GAP
    row = TILE + 2 * LINE + GAP
    sheet = Image.new(
        "RGB", (GROUPS * (pair + GAP) + GAP, GROUP_SIZE * row + LINE + 2 * GAP), "white"
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(LINE - 4)
    for group in range(GROUPS):
        left = GAP + group * (pair + GAP)
        draw.text((left, GAP), f"group {group + 1}: before", "black", font)
        draw.text((left + TILE + GAP, GAP), "after", "black", font)
        for slot in range(GROUP_SIZE):
            top = LINE + 2 * GAP + slot * row
            for column, (pixels, caption) in enumerate(pairs[group * GROUP_SIZE + slot]):
                at = left + column * (TILE + GAP)
                sheet.paste(_tile(pixels), (at, top))
                for number, line in enumerate(caption):
                    text = _shorten(line, draw, font)
                    draw.text((at, top + TILE + number * LINE), text, "black", font)
    return sheet


def _tile(pixels: np.ndarray) -> Image.Image:
    # Small pictures keep their pixels visible.
    large = pixels.shape[0] > TILE
    how = Image.Resampling.LANCZOS if large else Image.Resampling.NEAREST
    return Image.fromarray(pixels).resize((TILE, TILE), how)


def _shorten(text: str, draw: ImageDraw.ImageDraw, font: Any) -> str:
    """`text` cut to the width of a tile."""
    while draw.textlength(text, font) > TILE:
        text = text.rstrip("…")[:-1] + "…"
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = command_line.parser("python -m stvit_jax.contact_sheet", __doc__)
    parser.add_argument("config", help="configs/NAME.py[:ARG]")
    parser.add_argument("--output", required=True, help="the PNG to write")
    known, overrides = parser.parse_known_args(argv)
    config = command_line.read_config(known.config, overrides)
    output = command_line.local_path("--output", known.output)
    if not output.parent.is_dir():
        raise UserError(f"{output.parent} does not exist: create it, or correct --output")
    sheet = contact_sheet(config)
    try:
        sheet.save(output, "PNG")
    except OSError as error:
        raise UserError(f"{output} cannot be written: {reason(error)}") from error
    say(f"{output}: {GROUPS * GROUP_SIZE} images before and after augmentation")


if __name__ == "__main__":
    command_line.entry(main)
