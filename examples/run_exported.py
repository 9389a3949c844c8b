"""Runs a network that `python -m stvit_jax.export` wrote; needs jax, flatbuffers, numpy and pillow.

python run_exported.py NETWORK IMAGE ...
"""

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
side, short = (meta["preprocessing"][key] for key in ("centre_crop", "resize_short_side"))


def crop(path: str) -> np.ndarray:
    """The picture as the network was evaluated on it: (S, S, 3), uint8."""
    image = Image.open(path).convert("RGB")
    size = (short or side,) * 2
    if short:
        size = tuple(short * length // min(image.size) for length in image.size)
    left, top = (round((length - side) / 2) for length in size)
    image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + side, top + side)))


probabilities = jax.nn.softmax(network(np.stack([crop(path) for path in sys.argv[2:]])))
for path, row in zip(sys.argv[2:], np.asarray(probabilities), strict=True):
    print(path)
    for label in np.argsort(-row)[:5]:
        print(f"{row[label]:9.2%}  {meta['classes'][label]}")
