"""Scenes with an annotation each, in the layout of ADEChallengeData2016.

    images/training/X.jpg, annotations/training/X.png          or train
    images/validation/X.jpg, annotations/validation/X.png      or val

Images may be of any format that is read, and in folders inside. Annotations are PNG files as
`data.annotations` reads them: 0 is ignored, 1 to K are the classes. Scenes are in the order of
their paths. `ade20k` has its 150 classes; a `segmentation_folder` lists its own in `classes.txt`,
beside `images`; `digit_scenes` are made where they are missing; `fake` ones are in no file.
"""

import dataclasses
import os
from typing import Any

import numpy as np

from stvit_jax.console import Progress, say
from stvit_jax.data import class_lists, files
from stvit_jax.data.annotations import (
    IGNORED,
    WrongAnnotation,
    check_size,
    header_size,
    read_annotation,
    scene_size,
)
from stvit_jax.data.decode import UnreadableImage
from stvit_jax.data.sources import Source
from stvit_jax.data.sources.fake import SCENES, FakeScenes
from stvit_jax.data.sources.scan import LeftOut, images_below
from stvit_jax.errors import UserError, listing, one_line

ADE20K = "ADEChallengeData2016"
SPLITS = {True: ("training", "train"), False: ("validation", "val")}  # by whether it is to train on
LOOKED_AT = 64  # annotations
_LAYOUT = "images/training, images/validation, annotations/training and annotations/validation"
_ADDRESS = f"http://data.csail.mit.edu/places/ADEchallenge/{ADE20K}.zip"


@dataclasses.dataclass(frozen=True)
class SceneSource(Source):
    """A split of scenes.

    Attributes:
      class_names: by label.
      palette: uint8 (K, 3), RGB, the colour of every class in pictures.
      images: the folder of the images.
      annotations: the folder of the annotations.
      names: paths of the images within their folder, as bytes, sorted (one compact array, of which
        every loader process gets a copy).
    """

    class_names: tuple[str, ...]
    palette: np.ndarray
    images: str
    annotations: str
    names: np.ndarray

    @property
    def name(self) -> str:
        return self.images

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The bytes of both files: "image" and "annotation"."""
        return {
            "image": _read(self.where(index)),
            "annotation": _read(self.annotation(index)),
        }

    def where(self, index: int) -> str:
        return os.path.join(self.images, os.fsdecode(self.names[index]))

    def annotation(self, index: int) -> str:
        """The path of an annotation."""
        return os.path.join(self.annotations, _paired(os.fsdecode(self.names[index])))

    def sizes(self) -> np.ndarray:
        """Height and width of every scene, by `scene_size`: int32 (N, 2). Only headers are read."""
        sizes = np.zeros((len(self), 2), np.int32)
        progress = Progress(f"reading the sizes of the scenes in {self.name}", len(self))
        for index in range(len(self)):
            sizes[index] = scene_size(self.where(index), self.annotation(index))
            progress.update(index + 1)
        return sizes


def open_scenes(source: str, data_dir: str, *, train: bool) -> SceneSource | FakeScenes:
    """Opens one split of a set of scenes.

    Args:
      source: `ade20k`, `segmentation_folder`, `digit_scenes` or `fake` (config `data.source`).
      data_dir: the folder that holds `images` and `annotations`; of ade20k also the folder around
        it; of digit_scenes the data directory of tfds, empty for its default (config `data.dir`).
      train: the split to train on, else the one to evaluate on.

    Raises:
      UserError: there is no such set, it has not this layout, a file has no partner, or annotations
        are not what they should be.
    """
    if source == "fake":
        return FakeScenes(SCENES[train])
    if source == "ade20k":
        root, (names, palette) = _ade20k(data_dir), class_lists.ade20k()
    elif source == "segmentation_folder":
        root = _root(data_dir, f"data.source={source} needs data.dir with {_LAYOUT}")
        names, palette = class_lists.listed(os.path.join(root, "classes.txt"))
    elif source == "digit_scenes":
        from stvit_jax.data import digit_scenes

        root = str(digit_scenes.prepare(data_dir))
        names, palette = class_lists.listed(os.path.join(root, "classes.txt"))
    else:
        raise UserError(
            f"data.source {source!r} is unknown for segmentation: use 'ade20k', "
            "'segmentation_folder', 'digit_scenes' or 'fake'"
        )
    images, annotations = (_split(root, kind, train) for kind in ("images", "annotations"))
    scenes = SceneSource(names, palette, images, annotations, _pairs(images, annotations))
    _look_at(scenes)
    return scenes


def _ade20k(data_dir: str) -> str:
    need = f"data.source=ade20k needs data.dir with {ADE20K} ({_ADDRESS})"
    inside = os.path.join(data_dir, ADE20K)
    return inside if data_dir and os.path.isdir(inside) else _root(data_dir, need)


def _root(data_dir: str, need: str) -> str:
    """`data_dir`, where it holds the layout."""
    if not data_dir:
        raise UserError(f"data.dir is empty: {need}")
    if not os.path.lexists(data_dir):
        raise UserError(f"data.dir {data_dir} does not exist: correct it; {need}")
    for kind in ("images", "annotations"):
        if not os.path.isdir(path := os.path.join(data_dir, kind)):
            raise UserError(f"{path} is no folder: {need}")
    return data_dir


def _split(root: str, kind: str, train: bool) -> str:
    """The folder of a split of images or annotations."""
    paths = [os.path.join(root, kind, name) for name in SPLITS[train]]
    for path in paths:
        if os.path.isdir(path):
            return path
    raise UserError(f"{paths[0]} does not exist: put the {kind} there, or into {paths[1]}")


def _pairs(images: str, annotations: str) -> np.ndarray:
    """Names of the images, each of which has an annotation, and none is left."""
    found = _listed(images)
    if not found:
        raise UserError(
            f"{images} holds no images: put some there, and their annotations into {annotations}"
        )
    there = {name for name in _listed(annotations) if name.endswith(".png")}
    wanted: dict[str, str] = {}
    for name in found:
        if (first := wanted.setdefault(_paired(name), name)) != name:
            raise UserError(
                f"{one_line(first)} and {one_line(name)} in {images} would share one annotation: "
                "rename one, or remove it"
            )
    if lone := [name for annotation, name in wanted.items() if annotation not in there]:
        raise UserError(
            f"{len(lone)} of the {len(found)} images in {images} have no annotation in "
            f"{annotations} ({listing(lone)}): add a PNG file of the same name, or remove them"
        )
    if lone := sorted(there - wanted.keys()):
        raise UserError(
            f"{len(lone)} of the {len(there)} annotations in {annotations} have no image in "
            f"{images} ({listing(lone)}): add it, or remove them"
        )
    return np.array([os.fsencode(name) for name in found])


def _listed(folder: str) -> list[str]:
    """Paths of the images in a folder and below, within it, sorted."""
    left_out = LeftOut()
    found = sorted(os.path.relpath(path, folder) for path in images_below(folder, left_out))
    if left_out and folder not in _said:
        _said.add(folder)
        say(f"left out in {folder}: {left_out}")
    return found


_said: set[str] = set()  # folders, which are opened by several parts of a run


def _paired(image: str) -> str:
    """The name of an image's annotation."""
    return f"{os.path.splitext(image)[0]}.png"


def _look_at(scenes: SceneSource) -> None:
    """Looks at annotations spread evenly over a split.

    Raises:
      UserError: some are wrong, none can be read, or none has a class.
    """
    wrong: list[str] = []
    damaged: list[str] = []
    empty = 0
    places = range(0, len(scenes), -(-len(scenes) // LOOKED_AT))
    for place in places:
        path = scenes.annotation(place)
        try:
            label = read_annotation(_read(path), len(scenes.class_names))
            if size := header_size(scenes.where(place)):
                check_size(label, *size)
            empty += bool((label == IGNORED).all())
        except WrongAnnotation as error:
            wrong.append(f"{one_line(scenes.where(place), 1000)}: {error}")
        except UnreadableImage as error:
            # One among others is counted when its turn comes.
            damaged.append(f"{one_line(scenes.where(place), 1000)}: {error}")
    looked = f"of the {len(places)} annotations looked at in {scenes.annotations}"
    if wrong:
        raise UserError(f"{len(wrong)} {looked} are wrong; the first: {wrong[0]}")
    if len(damaged) == len(places):
        raise UserError(f"none {looked} can be read; the first: {damaged[0]}: check the data set")
    if empty == len(places) - len(damaged):
        raise UserError(
            f"none {looked} has a class, all of them are ignored: annotate, with 1 for the first "
            "class"
        )
    if empty and scenes.annotations not in _said:
        _said.add(scenes.annotations)
        say(f"{empty} {looked} have no class: all of their pixels are ignored")


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise files.fault(path, error) from error
