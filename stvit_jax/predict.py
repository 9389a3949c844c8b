"""What a trained network says of pictures: the five likeliest classes of each.

    python -m stvit_jax.predict --weights PATH IMAGE|FOLDER ... [--output FOLDER]

A segmenter says it of every pixel: FOLDER gets two files of each picture, its labels and the
picture under their colours, see `predict_scenes`; said are the shares of the classes.

PATH is of any form that `init_from` takes: a file, a folder, the workdir of a run. Of a folder all
pictures are taken that are in it and in folders inside; what else is there is counted and left out.
A picture that cannot be read is named, and the exit code is 1 when all others are done.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from stvit_jax import command_line, predict_scenes, programs
from stvit_jax.checkpoints import files
from stvit_jax.checkpoints.trained import Trained, load_trained
from stvit_jax.console import Progress, say, warn
from stvit_jax.data.decode import UnreadableImage
from stvit_jax.data.imagenet_names import display_names
from stvit_jax.data.pictures import Crop, crops, find
from stvit_jax.data.sources.scan import LeftOut
from stvit_jax.errors import UserError, one_line, reason
from stvit_jax.inference import network

TOP = 5  # classes that are said
BATCH = 32  # pictures at most, unless stated

Row = dict[str, Any]  # what is said of a picture, as JSON has it


def predict(
    trained: Trained, paths: Sequence[str], image_size: int, batch_size: int
) -> Iterator[Row]:
    """What `trained` says of each picture, in order.

    Args:
      trained: a classifier.
      paths: of at least one picture.
      image_size: side of the crops in pixels.
      batch_size: pictures that are computed at once, at most.

    Raises:
      UserError: as `network`.

    Yields:
      `image`, the path, and `top`, of the likeliest classes first: `label`, `name`, `probability`;
      or, of a picture that cannot be read, `error` in its place.
    """
    names = display_names(trained.classes, trained.model.num_classes)
    logits, variables = network(trained)
    # Few pictures are no whole batch; and the numbers that there are repeat, so programs are kept.
    batch_size = min(batch_size, 1 << (len(paths) - 1).bit_length())

    softmax = jax.jit(lambda variables, images: jax.nn.softmax(logits(variables, images)))

    def probabilities(batch: list[Crop]) -> Iterator[np.ndarray]:
        images = np.zeros((batch_size, image_size, image_size, 3), np.uint8)
        readable = [crop for crop in batch if not isinstance(crop, UnreadableImage)]
        for image, crop in zip(images, readable, strict=False):
            image[:] = crop
        return iter(np.asarray(softmax(variables, images))) if readable else iter(())

    remaining = iter(paths)
    for batch in crops(paths, image_size, batch_size):
        rows = probabilities(batch)
        for crop in batch:
            path = next(remaining)
            if isinstance(crop, UnreadableImage):
                yield {"image": path, "error": str(crop)}
            else:
                yield {"image": path, "top": _top(next(rows), names)}


def _top(probabilities: np.ndarray, names: Sequence[str]) -> list[Row]:
    likeliest = np.argsort(-probabilities, kind="stable")[:TOP]
    return [
        {"label": int(label), "name": names[label], "probability": float(probabilities[label])}
        for label in likeliest
    ]


def _answers(trained: Trained, paths: Sequence[str], args: argparse.Namespace) -> Iterator[Row]:
    """The rows of all pictures, of either kind of network."""
    size, text = args.image_size or trained.image_size, args.output
    kind = "a segmenter" if trained.is_segmenter else "a classifier"
    if trained.is_segmenter:
        if text is None:
            raise UserError(f"{trained.source} is of {kind}: name a folder for its files, --output")
        if args.batch_size is not None:
            raise UserError(
                f"{trained.source} is of {kind}, which takes pictures one by one: leave out "
                "--batch-size"
            )
        folder = command_line.local_path("--output", text)
        written = predict_scenes.outputs(folder, paths)
        try:  # what cannot be written should fail before the work
            files.make_folder_of(written[0][0])
        except OSError as error:
            raise UserError(f"{folder} cannot be created: {reason(error)}") from error
        what = f"{trained.settings['head']} on {trained.settings['name']}"
        say(f"{what} of {trained.source}, short sides of {size} pixels")
        return predict_scenes.predict(trained, paths, size, written)
    if text is not None:
        raise UserError(f"{trained.source} is of {kind}, which writes no files: leave out --output")
    say(f"{trained.settings['name']} of {trained.source}, {size} x {size} pixels")
    return predict(trained, paths, size, args.batch_size or BATCH)


def report(row: Row) -> None:
    """Says it to a person."""
    say(one_line(row["image"]))
    for guess in row.get("top", ()):
        say(f"{guess['probability']:9.2%}  {one_line(guess['name'])}")
    for found in row.get("classes", ()):
        say(f"{found['share']:9.2%}  {one_line(found['name'])}")
    if "labels" in row:
        say(f"  in {one_line(row['labels'])} and {one_line(row['overlay'])}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = command_line.parser("python -m stvit_jax.predict", __doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER")
    parser.add_argument("--weights", required=True, metavar="PATH")
    parser.add_argument("--ema", action="store_true", help="take the moving average")
    parser.add_argument(
        "--image-size", type=int, help="pixels of a side, or of the short side; as trained"
    )
    parser.add_argument("--batch-size", type=int, help="pictures at once, of a classifier")
    parser.add_argument("--output", metavar="FOLDER", help="for the answers of a segmenter")
    parser.add_argument("--json", action="store_true", help="nothing but JSON on standard output")
    args = parser.parse_args(argv)
    for flag, value in (("--image-size", args.image_size), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{flag} is {value}; it must be at least 1")

    rows = []
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        left_out = LeftOut()
        paths = find(args.images, left_out)
        programs.keep(deterministic=False)
        trained = load_trained(args.weights, args.ema)
        answers = _answers(trained, paths, args)
        if left_out:
            say(f"left out: {left_out}")
        progress = Progress("predicting", len(paths))
        for row in answers:
            rows.append(row)
            if "error" in row:
                warn(f"{one_line(row['image'])} cannot be read: {one_line(row['error'])}")
            elif not args.json:
                report(row)
            progress.update(len(rows))
    if args.json:
        say("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]")
    unreadable = sum("error" in row for row in rows)
    if unreadable:
        warn(f"{unreadable} of {len(rows)} pictures cannot be read")
    return 1 if unreadable else 0


if __name__ == "__main__":
    command_line.entry(main)
