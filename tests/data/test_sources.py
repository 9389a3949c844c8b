"""What is common to sources, and the random pictures."""

import io

import numpy as np
import pytest
from PIL import Image

from stvit_jax.data.sources import open_source
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


def test_an_unknown_source() -> None:
    with pytest.raises(UserError, match="'webdataset' is unknown: use 'tfds', 'folder' or 'fake'"):
        open_source("webdataset", "", "", train=True)
