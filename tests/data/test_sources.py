"""What is common to sources, and the random pictures."""

import io

import numpy as np
import pytest
from PIL import Image

from stvit_jax.data.annotations import read_annotation
from stvit_jax.data.sources import open_source
from stvit_jax.data.sources.scenes import open_scenes
from stvit_jax.errors import UserError


def test_fake_pictures_are_jpegs_and_repeatable() -> None:
    source = open_source("fake", "", "", train=True)
    again = open_source("fake", "", "", train=False)
    assert (len(source), len(again), source.num_classes) == (1_281_167, 1000, 1000)
    assert source[999] == again[999]
    data = source[999]["image"]
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size) == ("JPEG", (500, 375))
    assert np.asarray(image).std() > 20
    assert data != source[998]["image"]


def test_fake_scenes_are_as_large_as_their_annotations_and_have_classes() -> None:
    scenes = open_scenes("fake", "", train=True)
    assert (len(scenes), scenes.num_classes) == (20_210, 150)
    scene = scenes[999]
    label = read_annotation(scene["annotation"], 150)
    assert Image.open(io.BytesIO(scene["image"])).size[::-1] == label.shape
    assert (scenes.sizes() == label.shape).all() and len(scenes.sizes()) == len(scenes)
    assert len(np.unique(label)) > 30
    assert scene == open_scenes("fake", "", train=False)[999]


def test_an_unknown_source() -> None:
    with pytest.raises(UserError, match="'webdataset' is unknown: use 'tfds', 'folder' or 'fake'"):
        open_source("webdataset", "", "", train=True)
