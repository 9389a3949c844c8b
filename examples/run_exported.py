"""Runs a network that `python -m stvit_jax.export` wrote; needs jax, flatbuffers, numpy and pillow.

python run_exported.py NETWORK IMAGE ...

Of a classifier it prints the likeliest classes, of a segmenter the shares of the largest.
"""

import itertools
import json
import sys
import zipfile

import jax
import jax.export
import numpy as np
from PIL import Image

with zipfile.ZipFile(sys.argv[1]) as archive:
    network = jax.export.deserialize(bytearray(archive.read("program"))).call
    meta = json.loads(archive.read("meta.json"))
how = meta["preprocessing"]
side, short = meta["input"]["shape"][1], how["resize_short_side"]


def crop(path: str) -> np.ndarray:
    """The picture as a classifier was evaluated on it: (S, S, 3), uint8."""
    image = Image.open(path).convert("RGB")
    size = (short or side,) * 2
    if short:
        size = tuple(short * length // min(image.size) for length in image.size)
    left, top = (round((length - side) / 2) for length in size)
    image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + side, top + side)))


def answer(path: str) -> np.ndarray:
    """A segmenter's label of every pixel of the picture, resized: windows, whose logits add up."""
    image = Image.open(path).convert("RGB")
    size = tuple(round(short * length / min(image.size)) for length in image.size)
    # Pillow's averages where it makes smaller; the protocol's rule, OpenCV's, does not.
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    starts = [
        [*range(0, length - side, how["stride"]), length - side] for length in pixels.shape[:2]
    ]
    total = np.zeros((*pixels.shape[:2], len(meta["classes"])), np.float32)
    for top, left in itertools.product(*starts):
        window = np.s_[top : top + side, left : left + side]
        total[window] += network(pixels[window][None])[0]
    return np.argmax(total, axis=-1)  # a mean would have the same


paths = sys.argv[2:]
if "palette" in meta:
    labels = [np.bincount(answer(path).ravel(), minlength=len(meta["classes"])) for path in paths]
    rows = [counts / counts.sum() for counts in labels]
else:
    rows = np.asarray(jax.nn.softmax(network(np.stack([crop(path) for path in paths]))))
for path, row in zip(paths, rows, strict=True):
    print(path)
    for label in np.argsort(-row)[:5]:
        print(f"{row[label]:9.2%}  {meta['classes'][label]}")
