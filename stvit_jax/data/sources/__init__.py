"""Where examples come from: random access to undecoded features.

`tfds`: any set of tfds with images, prepared as ArrayRecord. `folder`: class folders. `fake`:
random pictures for benchmarks. All of them pickle small, for the loader's processes.
"""

import abc
import contextlib
from typing import Any

from stvit_jax.errors import UserError, listing

LOOKED_AT = 256  # labels


class Source(abc.ABC):
    """Random access to one split of a set.

    Attributes:
      name: of the set, for messages.
      class_names: by label; empty where the examples have no class label.
    """

    name: str
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Classes of the label."""
        return len(self.class_names)

    @abc.abstractmethod
    def __len__(self) -> int:
        """Examples."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]:
        """The features of an example: "image" (encoded) and, with classes, "label" (int).

        Raises:
          UserError: the file that holds it is damaged; it is named.
        """

    @abc.abstractmethod
    def where(self, index: int) -> str:
        """What a message calls an example: its file, and its place there."""


def check_labels(source: Source, what: str) -> None:
    """Looks at labels spread evenly over a split, `what` for messages.

    Raises:
      UserError: some are none of its classes, as where a set withholds the labels of its test.
    """
    labels = []
    for place in range(0, len(source), -(-len(source) // LOOKED_AT)):
        # A damaged record is named when its turn comes: then what was learned before is saved.
        with contextlib.suppress(UserError):
            labels.append(source[place]["label"])
    wrong = [label for label in labels if not 0 <= label < source.num_classes]
    if wrong:
        raise UserError(
            f"{len(wrong)} of the {len(labels)} labels looked at in {what} are none of its classes "
            f"0..{source.num_classes - 1} (but {listing(sorted(set(wrong)))}): they are withheld "
            "or wrong, choose another data set"
        )


def open_source(source: str, name: str, data_dir: str, *, train: bool) -> Source:
    """Opens one split of a set of images with class labels.

    Args:
      source: `tfds`, `folder` or `fake` (config `data.source`).
      name: tfds name, as `name/config` for a set with several (config `data.name`).
      data_dir: tfds's data directory, empty for its default; or the folder that holds `train/` and
        `val/` (config `data.dir`).
      train: the split to train on, else the one to evaluate on.

    Raises:
      UserError: there is no such set, or it is not prepared, or not one of labelled images.
    """
    if source == "tfds":
        from stvit_jax.data.sources.tfds import open_labelled

        return open_labelled(name, data_dir, train=train)
    if source == "folder":
        from stvit_jax.data.sources.folder import open_folder

        return open_folder(data_dir, train=train)
    if source == "fake":
        from stvit_jax.data.sources.fake import open_fake

        return open_fake(train=train)
    raise UserError(f"data.source {source!r} is unknown: use 'tfds', 'folder' or 'fake'")
