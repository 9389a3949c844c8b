"""What a trained segmenter says of pictures: files of their labels and colours, shares of classes.

Each picture is resized as in the tests of the papers, its short side to that of the network's
pictures, and seen as a whole; the answer has the picture's own size. Of `NAME.jpg` two files are
written:

    NAME.png            labels, as the annotations of a training set: 1 is the first class
    NAME.overlay.png    the picture under the colours of its classes, with their names

where pictures in several folders have one name, the second is `NAME-2`.
"""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stvit_jax import figures
from stvit_jax.checkpoints import files
from stvit_jax.checkpoints.trained import Trained
from stvit_jax.data import pictures
from stvit_jax.data.annotations import MOST_CLASSES, write_annotation
from stvit_jax.data.class_lists import of_network
from stvit_jax.data.decode import UnreadableImage
from stvit_jax.errors import UserError, one_line, reason
from stvit_jax.inference import network
from stvit_jax.ops import resize

ROUNDED_TO = 128  # sides of answers, so that fewer programs are compiled

Outputs = tuple[Path, Path]  # of labels, and of their colours
Row = dict[str, Any]  # what is said of a picture, as JSON has it


def outputs(folder: Path, paths: Sequence[str]) -> list[Outputs]:
    """Where the answer to each picture goes: no two into one file, and none that is there.

    Raises:
      UserError: one is there already.
    """
    taken: set[str] = set()
    chosen = []
    for path in paths:
        stem, number = Path(path).stem, 1
        while True:
            name = stem if number == 1 else f"{stem}-{number}"
            both = f"{name}.png", f"{name}.overlay.png"
            # Some file systems do not tell capital letters from small ones.
            if taken.isdisjoint(keys := {file.casefold() for file in both}):
                break
            number += 1
        taken |= keys
        chosen.append((folder / both[0], folder / both[1]))
    for output in (file for both in chosen for file in both):
        if os.path.lexists(output):
            raise UserError(f"{output} exists; remove it, or choose another output")
    return chosen


def predict(
    trained: Trained, paths: Sequence[str], image_size: int, written: Sequence[Outputs]
) -> Iterator[Row]:
    """What `trained` says of each picture, in order; its files are written.

    Args:
      trained: a segmenter.
      paths: of at least one picture.
      image_size: what the short sides are resized to, in pixels.
      written: see `outputs`.

    Raises:
      UserError: as `network`; more classes than a PNG has room for; or files cannot be written.

    Yields:
      `image`, the path; `labels` and `overlay`, the files; and `classes`, of those that are in the
      picture, the largest first: `label`, `name`, `share` of its pixels. Or, of a picture that
      cannot be read, `error` in their place.
    """
    count = trained.model.num_classes
    if count > MOST_CLASSES:
        raise UserError(
            f"{trained.source} has {count} classes, and a PNG has room for {MOST_CLASSES}: from "
            "Python, stvit_jax.from_pretrained loads it"
        )
    names, palette = of_network(trained.classes, count)
    ask = asker(trained)
    for scene, path, (labels, overlay) in zip(
        pictures.scenes(paths, image_size), paths, written, strict=True
    ):
        if isinstance(scene, UnreadableImage):
            yield {"image": path, "error": str(scene)}
            continue
        picture, view = scene
        label = ask(view, picture.shape[:2])
        shares = np.bincount(label.ravel(), minlength=count) / label.size
        found = [int(k) for k in np.argsort(-shares, kind="stable") if shares[k]]
        legend = [(f"{shares[k]:.1%} {one_line(names[k], 40)}", palette[k]) for k in found]
        drawn = figures.with_legend(figures.overlay(picture, label, palette), legend)
        for file, content in (
            (labels, write_annotation(label, palette)),
            (overlay, figures.png(drawn)),
        ):
            try:
                with files.replaced(file) as opened:
                    opened.write(content)
            except OSError as error:
                raise UserError(f"{file} cannot be written: {reason(error)}") from error
        classes = [{"label": k, "name": names[k], "share": float(shares[k])} for k in found]
        yield {
            "image": path,
            "labels": str(labels),
            "overlay": str(overlay),
            "classes": classes,
        }


def asker(trained: Trained) -> Any:
    """A function of a view, uint8 (h, w, 3), and the picture's size (H, W), to its labels.

    They are uint8 (H, W), of the logits of the view brought to that size. A photograph's logits of
    all classes may be larger than a memory: they are computed row by row.
    """
    logits, variables = network(trained)
    seen = jax.jit(lambda variables, view: logits(variables, view[None])[0])

    @partial(jax.jit, static_argnums=2)
    def answers(logits: jax.Array, size: jax.Array, shape: resize.Size) -> jax.Array:
        def of_row(row: jax.Array) -> jax.Array:
            there = resize.bilinear_row(logits, row, size, shape[1])
            return jnp.argmax(there, axis=-1).astype(jnp.uint8)

        return jax.lax.map(of_row, jnp.arange(shape[0]))

    def ask(view: np.ndarray, size: resize.Size) -> np.ndarray:
        shape = tuple(-(-side // ROUNDED_TO) * ROUNDED_TO for side in size)
        label = answers(seen(variables, view), np.array(size, np.int32), shape)
        return np.asarray(label)[: size[0], : size[1]]

    return ask
