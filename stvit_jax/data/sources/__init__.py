"""Where images come from: random access to (encoded image, label) pairs.

`tfds`: any image-classification set of tfds, prepared as ArrayRecord. `folder`: class folders.
`fake`: random pictures for benchmarks. All of them pickle small, for the loader's processes.
"""

import abc
import bisect
import dataclasses
import difflib
import io
import itertools
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from stvit_jax.console import Progress
from stvit_jax.errors import UserError, described

EVAL_SPLITS = ("validation", "test")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
FAKE_TRAIN, FAKE_EVAL, FAKE_CLASSES = 1_281_167, 1_000, 1_000
FAKE_PICTURES, FAKE_SIZE = 16, (500, 375)


class Source(abc.ABC):
    """Random access to one split of an image-classification set.

    Attributes:
      name: of the set, for messages.
      class_names: by label.
    """

    name: str
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @abc.abstractmethod
    def __len__(self) -> int:
        """Images."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """The encoded image and its label; UserError, naming the file, where that is damaged."""

    @abc.abstractmethod
    def where(self, index: int) -> str:
        """What a message calls an image: its file, and its place there."""


def open_source(source: str, name: str, data_dir: str, *, train: bool) -> Source:
    """Opens one split of a data set.

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
        return open_tfds(name, data_dir, train=train)
    if source == "folder":
        return _open_folder(Path(data_dir), train)
    if source == "fake":
        return FakeSource(FAKE_TRAIN if train else FAKE_EVAL)
    raise UserError(f"data.source {source!r} is unknown: use 'tfds', 'folder' or 'fake'")


# --- tfds ---


@dataclasses.dataclass(frozen=True)
class TfdsSource(Source):
    """A split in ArrayRecord files.

    Attributes:
      name: as `tfds` has it.
      class_names: by label.
      records: tfds's random access to the examples of the split, images left encoded.
      image_key: the feature that holds the encoded image.
      label_key: the feature that holds the label.
    """

    name: str
    class_names: tuple[str, ...]
    records: Any
    image_key: str
    label_key: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        try:
            example = self.records[index]
        except Exception as error:
            # array_record raises RuntimeError for a failed checksum and for a missing file; what
            # passes and is no example all the same fails in tfds's parser.
            raise UserError(
                f"{self.where(index)} cannot be read, the file is damaged: restore it or prepare "
                f"the data set again ({described(error)})"
            ) from error
        return example[self.image_key], int(example[self.label_key])

    def where(self, index: int) -> str:
        parts = self.records.dataset_info.splits[self.records.split].file_instructions
        ends = list(itertools.accumulate(part.take for part in parts))
        part = bisect.bisect_right(ends, index)
        within = index - ends[part] + parts[part].take
        return f"{parts[part].filename}, record {within}"


def open_tfds(name: str, data_dir: str, *, train: bool, label_key: str | None = None) -> TfdsSource:
    """As `open_source`; `label_key` names another feature than the set's own label."""
    builder = _find_prepared(name, data_dir, label_key)
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise UserError(
            f"{builder.data_path} is prepared as {'/'.join(sorted(formats))}, which has no random "
            "access; convert it once with: python -m stvit_jax.data.array_record "
            + shlex.quote(str(builder.data_path))
        )

    splits = builder.info.splits
    wanted = ("train",) if train else EVAL_SPLITS
    split = next((split for split in wanted if split in splits), None)
    if split is None:
        raise UserError(
            f"tfds data set {name!r} has no split {' or '.join(wanted)} "
            f"(it has {', '.join(splits)}): choose another data.name"
        )
    image_key, label_key, class_names = _image_and_label(name, builder.info, label_key)
    import tensorflow_datasets as tfds

    records = builder.as_data_source(
        split, decoders={image_key: tfds.decode.SkipDecoding()}, file_format="array_record"
    )
    return TfdsSource(name, class_names, records, image_key, label_key)


def _find_prepared(name: str, data_dir: str, label_key: str | None) -> Any:
    """The builder of a prepared set, made from its files: no code of the set is imported."""
    import tensorflow_datasets as tfds
    from etils import epath
    from tensorflow_datasets.core import read_only_builder

    from stvit_jax.data import digits

    try:
        if name == "digits":
            digits.prepare(data_dir)
        elif data_dir and not epath.Path(data_dir).exists():
            raise UserError(f"data.dir {data_dir} does not exist: create it, or correct data.dir")
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir or None)
        len(builder.info.features)  # read here, so that damage is noticed here
        return builder
    except UserError:
        raise
    except tfds.core.DatasetNotFoundError:
        raise _unprepared(name, data_dir, label_key) from None
    except Exception as error:  # a name that tfds cannot parse; metadata that no reader takes
        raise UserError(
            f"tfds data set {name!r} cannot be opened ({described(error)}): correct data.name, or "
            "prepare the set again if its files are damaged"
        ) from error


def _unprepared(name: str, data_dir: str, label_key: str | None) -> UserError:
    """What to do about a set that is not there: correct its name, or the command to prepare it."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)  # "digits" registered itself
    base = name.split("/")[0].split(":")[0]
    if base not in known:
        close = difflib.get_close_matches(base, known) or ["digits", "imagenet2012", "cifar100"]
        return UserError(
            f"data.name {name!r} is not a tfds data set: did you mean {' or '.join(close)}?"
        )
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
        _image_and_label(name, builder.info, label_key)
    except UserError as error:
        return error
    except Exception as error:  # no such variant or version
        return UserError(f"tfds data set {name!r} cannot be prepared: {described(error)}")
    where = f", data_dir={data_dir!r}" if data_dir else ""
    manual, note = "", ""
    if instructions := builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        manual = ", download_config=tfds.download.DownloadConfig(manual_dir='MANUAL_DIR')"
        note = f", with your own folder for MANUAL_DIR; {' '.join(instructions.split())}"
    return UserError(
        f"tfds data set {name!r} is not prepared in {data_dir or 'the default tfds directory'}; "
        'prepare it once with: python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}{where}).download_and_prepare(file_format='array_record'{manual})\""
        + note
    )


def _image_and_label(
    name: str, info: Any, label_key: str | None
) -> tuple[str, str, tuple[str, ...]]:
    """(image feature, label feature, class names) of a set; UserError where it has none."""
    import tensorflow_datasets as tfds

    image_key, usual_label_key = (info.supervised_keys or ("image", "label"))[:2]
    label_key = label_key or usual_label_key
    features = info.features if isinstance(info.features, tfds.features.FeaturesDict) else {}
    for key, kind in ((image_key, tfds.features.Image), (label_key, tfds.features.ClassLabel)):
        if not (key in features and isinstance(features[key], kind)):
            raise UserError(
                f"tfds data set {name!r} has no {kind.__name__} feature {key!r}, so it is not one "
                "of labelled images: choose another data.name"
            )
    label = features[label_key]
    return image_key, label_key, tuple(label.int2str(i) for i in range(label.num_classes))


# --- class folders ---


@dataclasses.dataclass(frozen=True)
class FolderSource(Source):
    """A split in class folders; a file's label is the rank of its folder's name.

    Attributes:
      class_names: folder names, sorted.
      root: the folder of the class folders.
      names: file names within their class folders, as bytes, sorted by class and name (one compact
        array: ImageNet's are 40 MB, and every loader process gets a copy).
      labels: int32, by image.
    """

    class_names: tuple[str, ...]
    root: str
    names: np.ndarray
    labels: np.ndarray

    @property
    def name(self) -> str:
        return self.root

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        path = self.where(index)
        try:
            with open(path, "rb") as file:
                return file.read(), int(self.labels[index])
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror}): restore the file") from error

    def where(self, index: int) -> str:
        folder = self.class_names[self.labels[index]]
        return os.path.join(self.root, folder, os.fsdecode(self.names[index]))


def _open_folder(root: Path, train: bool) -> FolderSource:
    folder, other = (root / "train", root / "val") if train else (root / "val", root / "train")
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist: data.source=folder needs data.dir with class folders under "
            "train/ and val/"
        )
    classes = _subfolders(folder)
    if not classes:
        raise UserError(f"{folder} has no class folders: put one folder of images per class there")
    if other.is_dir() and (different := sorted(set(classes) ^ set(_subfolders(other)))):
        raise UserError(
            f"{folder} and {other} have different classes (only in one: "
            f"{', '.join(different[:3])}): make their class folders the same"
        )
    names: list[bytes] = []
    labels: list[np.ndarray] = []
    progress = Progress(f"listing the images in {folder}", len(classes))
    for label, name in enumerate(classes):
        with os.scandir(folder / name) as entries:
            files = sorted(
                os.fsencode(entry.name)
                for entry in entries
                if os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and entry.is_file()
            )
        if not files:
            raise UserError(
                f"{folder / name} holds no images: put some into it (not into folders inside), or "
                "remove it"
            )
        names += files
        labels.append(np.full(len(files), label, np.int32))
        progress.update(label + 1)
    return FolderSource(tuple(classes), str(folder), np.array(names), np.concatenate(labels))


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


# --- random pictures ---


class FakeSource(Source):
    """Random pictures for benchmarks: as many as ImageNet, of its usual size, as JPEG.

    A few pictures are drawn (smooth shapes and grain, about as large as ImageNet's files) and
    encoded once, and then repeat. A label has nothing to do with its picture.
    """

    name = "fake pictures"
    class_names = tuple(f"fake{label}" for label in range(FAKE_CLASSES))

    def __init__(self, size: int) -> None:
        from PIL import Image

        self._size = size
        self._pictures: list[bytes] = []
        rng = np.random.Generator(np.random.Philox(key=0))
        for _ in range(FAKE_PICTURES):
            shapes = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
            grain = rng.normal(0, 10, (*FAKE_SIZE[::-1], 3))
            picture = np.asarray(shapes.resize(FAKE_SIZE, Image.Resampling.BICUBIC)) + grain
            file = io.BytesIO()
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
            self._pictures.append(file.getvalue())

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return self._pictures[index % FAKE_PICTURES], index % FAKE_CLASSES

    def where(self, index: int) -> str:
        return f"fake picture {index % FAKE_PICTURES}"
