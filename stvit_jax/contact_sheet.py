"""python -m stvit_jax.contact_sheet CONFIG --output PNG: what training sees, as one picture.

CONFIG is written as for train.py, and `--config.FIELD=VALUE` overrides work here, too. The pictures
come through the real loader and the real augmentation of the first step of a small batch: three
groups of six images. A row is one slot of each group, so with repeated augmentation its three
pairs are three copies of one image; a pair is the image as the host cut it, and after the device
augmentation, with the labels it is trained on.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from PIL import Image, ImageDraw, ImageFont

from stvit_jax import command_line
from stvit_jax import config as configs
from stvit_jax.augment import augment_batch
from stvit_jax.data.loader import train_batches
from stvit_jax.data.normalization import MEAN, STD
from stvit_jax.data.order import Order
from stvit_jax.data.sources import open_source
from stvit_jax.errors import UserError
from stvit_jax.training import step as training

GROUPS, GROUP_SIZE = 3, 6
TILE = 160  # pixels of a picture's side on the sheet
GAP = 6
LINE = 15  # height of a line of text

Captions = list[list[str]]  # lines of text, by image


def contact_sheet(config: ConfigDict) -> Image.Image:
    """The sheet of the first batch of a config, of GROUPS x GROUP_SIZE images.

    Raises:
      UserError: a mistake in the config or the data.
    """
    configs.validate(config)
    source = open_source(config.data.source, config.data.name, config.data.dir, train=True)
    count = GROUPS * GROUP_SIZE
    if len(source) < count:
        raise UserError(f"{source.name} has {len(source)} images, and the sheet shows {count}")
    order = Order(len(source), count, GROUP_SIZE, config.data.repeats, seed=config.seed)
    batches = train_batches(source, order, image_size=config.image_size, flip=config.data.flip)
    batch = next(batches)
    batches.close()
    images, targets = augment_batch(
        training.step_keys(config.seed, 0)[0],
        batch["image"],
        batch["label"],
        num_classes=source.num_classes,
        group_size=GROUP_SIZE,
        label_smoothing=config.label_smoothing,
        **config.augment,
    )
    after = np.clip((np.asarray(images) * STD + MEAN) * 255 + 0.5, 0, 255).astype(np.uint8)
    names = source.class_names
    labels = [_labels(target, names, config.label_smoothing) for target in np.asarray(targets)]
    return _draw(batch["image"], after, [[names[label]] for label in batch["label"]], labels)


def _draw(
    before: np.ndarray, after: np.ndarray, labels_before: Captions, labels_after: Captions
) -> Image.Image:
    """Rows of slots, a pair of pictures (before, after) of each group; uint8 (B, S, S, 3)."""
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
            at = group * GROUP_SIZE + slot
            top = LINE + 2 * GAP + slot * row
            for pixels, caption in (
                (before[at], labels_before[at]),
                (after[at], labels_after[at]),
            ):
                sheet.paste(_tile(pixels), (left, top))
                for number, line in enumerate(caption):
                    draw.text(
                        (left, top + TILE + number * LINE),
                        _shorten(line, draw, font),
                        "black",
                        font,
                    )
                left += TILE + GAP
            left -= 2 * (TILE + GAP)
    return sheet


def _tile(pixels: np.ndarray) -> Image.Image:
    # Small pictures keep their pixels visible.
    large = pixels.shape[0] > TILE
    how = Image.Resampling.LANCZOS if large else Image.Resampling.NEAREST
    return Image.fromarray(pixels).resize((TILE, TILE), how)


def _labels(target: np.ndarray, names: tuple[str, ...], label_smoothing: float) -> list[str]:
    """The one or two labels that weigh more than the smoothing gives to all, heaviest first."""
    own = np.flatnonzero(target > label_smoothing / len(target) + 1e-6)
    return [f"{names[i]}: {target[i]:.2f}" for i in sorted(own, key=lambda i: -target[i])]


def _shorten(text: str, draw: ImageDraw.ImageDraw, font: Any) -> str:
    """`text` cut to the width of a tile."""
    while draw.textlength(text, font) > TILE:
        text = text.rstrip("…")[:-1] + "…"
    return text


def _parse() -> tuple[ConfigDict, Path]:
    parser = argparse.ArgumentParser(
        prog="python -m stvit_jax.contact_sheet", description=__doc__.splitlines()[0]
    )
    parser.add_argument("config", help="configs/NAME.py[:ARG]")
    parser.add_argument("--output", required=True, type=Path, help="the PNG to write")
    known, overrides = parser.parse_known_args()
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values)
    rest = command_line.read_config(
        values, ["contact_sheet", f"--config={known.config}", *overrides]
    )
    if rest[1:]:
        parser.error(f"unrecognized argument {rest[1]!r}")
    if not known.output.parent.is_dir():
        raise UserError(f"{known.output.parent} does not exist: create it, or correct --output")
    return config.value, known.output


def main() -> None:
    """Writes the sheet; ends the program with one line where the user made a mistake."""
    try:
        config, output = _parse()
        sheet = contact_sheet(config)
    except UserError as error:
        sys.exit(f"error: {error}")
    try:
        sheet.save(output, "PNG")
    except OSError as error:
        sys.exit(f"error: {output} cannot be written: {error.strerror}")
    print(f"{output}: {GROUPS * GROUP_SIZE} images before and after augmentation")


if __name__ == "__main__":
    main()
