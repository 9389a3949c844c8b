"""The data set of the embedded default run: 1,797 handwritten digits, as a tfds data set.

scikit-learn ships the digits (8 x 8 pixels, grey values 0 to 16) inside its package, so nothing is
downloaded. The builder yields PNG bytes, not arrays: tfds encodes arrays with TensorFlow, and this
data set has to prepare and read without it.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from stvit_jax.console import say
from stvit_jax.errors import UserError, one_line

HOLD_OUT = 5


def split(target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which digits are trained on, and which are held out, by their classes; see `Digits`."""
    held_out = np.argsort(target, kind="stable")[::HOLD_OUT]
    return np.setdiff1d(np.arange(len(target)), held_out), held_out


class Digits(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits: 1,437 images to train on, 360 to test.

    The test split is fixed and stratified: of all images sorted by class (stably: in scikit-learn's
    order within a class), the first and every fifth after it.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="1,797 handwritten digits of 8 x 8 grey pixels, from scikit-learn.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            citation="E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI, 1998",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        from sklearn.datasets import load_digits  # takes seconds, and only the first run needs it

        digits = load_digits()
        kept, held_out = split(digits.target)
        return {
            "train": self._generate_examples(digits, kept),
            "test": self._generate_examples(digits, held_out),
        }

    def _generate_examples(self, digits: Any, indices: np.ndarray) -> Iterator[tuple[int, dict]]:
        for index in indices.tolist():
            grey = np.rint(digits.images[index] * (255 / 16)).astype(np.uint8)
            png = io.BytesIO()
            Image.fromarray(grey).save(png, format="PNG")
            yield index, {"image": png.getvalue(), "label": int(digits.target[index])}


def prepare(data_dir: str = "") -> tfds.core.DatasetBuilder:
    """Writes the data set as ArrayRecord where it is missing, and then says so in one line.

    Any number of processes may prepare at once: tfds writes beside the target and renames, so the
    first one wins and the others use its files.

    Args:
      data_dir: tfds data directory, made if needed; empty for tfds's own default.

    Returns:
      the builder of the prepared data set.

    Raises:
      UserError: the directory cannot be written to, or is full.
    """
    builder = Digits(data_dir=data_dir or None)
    if builder.data_path.exists():
        return builder
    say(f"Writing the digits data set (1,797 images, once) to {builder.data_dir}")
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # tfds prints two banners
            builder.download_and_prepare(file_format="array_record")
    except (OSError, RuntimeError) as error:  # array_record raises the latter for a full disk
        builder = Digits(data_dir=data_dir or None)
        if not builder.data_path.exists():
            raise UserError(
                f"cannot write the digits data set to {builder.data_dir} ({one_line(error)}): make "
                "room, or set data.dir to a directory that can be written"
            ) from error
    return builder
