"""A miniature ImageNet: generated JPEGs in the tar files of image-net.org, and as class folders."""

import io
import shlex
import subprocess
import sys
import tarfile
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from stvit_jax.data.sources import open_source
from stvit_jax.errors import UserError

VALIDATION = 24
TRAIN = 1056
UNREADABLE = 7  # the number of the picture, in both splits, that is cut short


def class_names() -> list[str]:
    """The WordNet ids of all classes, sorted."""
    return _tfds_list("labels.txt")


def picture(number: int, label: int) -> bytes:
    """A picture like ImageNet's: of any size, mostly colour, some grey, CMYK or PNG."""
    rng = np.random.default_rng(number)
    size = tuple(rng.integers(60, 120, 2).tolist())
    colours = np.random.default_rng(1000 + label).integers(0, 256, (2, 2, 3))  # tell the class
    noisy = np.clip(colours + rng.normal(0, 20, (2, 2, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(noisy).resize(size, Image.Resampling.BICUBIC)
    mode = {3: "L", 5: "CMYK"}.get(number, "RGB")
    file = io.BytesIO()
    image.convert(mode).save(file, "PNG" if number == 11 else "JPEG")
    data = file.getvalue()
    return data[: len(data) // 2] if number == UNREADABLE else data


def pictures() -> dict[str, dict[str, bytes]]:
    """By split (`train`, `val`) and `WNID/FILE` the encoded pictures."""
    classes = class_names()
    train = {}
    for number in range(TRAIN):  # of every class, so that folders have them all
        label = number % len(classes)
        train[f"{classes[label]}/{classes[label]}_{number}.JPEG"] = picture(number, label)
    val = {}
    for number, name in enumerate(_tfds_list("validation_labels.txt")[:VALIDATION]):
        file = f"ILSVRC2012_val_{number + 1:08}.JPEG"
        val[f"{name}/{file}"] = picture(number, classes.index(name))
    return {"train": train, "val": val}


def write_folders(root: Path) -> Path:
    """The pictures as class folders under `root/train` and `root/val`.

    An empty folder is no class, so those that have no picture to validate with get a black one.
    """
    split = pictures()
    black = io.BytesIO()
    Image.new("RGB", (1, 1)).save(black, "JPEG")
    empty = set(class_names()) - {name.split("/")[0] for name in split["val"]}
    split["val"] |= {f"{name}/black.JPEG": black.getvalue() for name in empty}
    for folder, files in split.items():
        for name, data in files.items():
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return root


def write_tars(root: Path) -> Path:
    """The pictures as ILSVRC2012_img_train.tar (tar files of classes), ILSVRC2012_img_val.tar."""
    root.mkdir(parents=True)
    split = pictures()
    by_class: dict[str, dict[str, bytes]] = {}
    for name, data in split["train"].items():
        wnid, file = name.split("/")
        by_class.setdefault(wnid, {})[file] = data
    train = {f"{wnid}.tar": tar(files) for wnid, files in by_class.items()}
    val = {name.split("/")[1]: data for name, data in split["val"].items()}
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar(train))
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar(val))
    return root


def tar(files: dict[str, bytes]) -> bytes:
    """A tar file with these files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def prepare(root: Path) -> Path:
    """Prepares tfds's own `imagenet2012` by the command that the error for a missing set gives.

    Returns:
      the tfds data directory.
    """
    data_dir = root / "tfds"
    data_dir.mkdir(parents=True)
    try:
        open_source("tfds", "imagenet2012", str(data_dir), train=True)
    except UserError as error:
        _, flag, program, *_ = shlex.split(str(error).split("with: ")[1])
    program = program.rstrip(",").replace("MANUAL_DIR", str(write_tars(root / "manual")))
    done = subprocess.run([sys.executable, flag, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return data_dir


def _tfds_list(name: str) -> list[str]:
    path = resources.files("tensorflow_datasets") / "datasets/imagenet2012" / name
    return path.read_text().split()
