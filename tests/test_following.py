"""A config that leaves the network to the weights takes all of it, a segmenter's head, too."""

import json

import jax
import numpy as np
import pytest

import stvit_jax
from stvit_jax import recipes
from stvit_jax.following import as_weights_have_it
from stvit_jax.models import settings
from stvit_jax.tasks import segmentation
from stvit_jax.training import workdir
from tests.program import NARROW_SETTINGS


@pytest.fixture(scope="module")
def fpn(tmp_path_factory):
    """A shared folder with Semantic FPN of eight channels; its values are of no interest."""
    model = stvit_jax.create_segmenter("fpn", "stvit_tiny", 3, channels=8, **NARROW_SETTINGS)
    path = tmp_path_factory.mktemp("weights") / "fpn"
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), settings.abstract(model))
    stvit_jax.save_pretrained(path, model, zeros, image_size=64)
    return path, model


def config_of(path):
    config = recipes.ade20k("")  # whose head is UPerNet's
    config.model.name, config.image_size, config.init_from = "", 0, str(path)
    config.dtype = "float32"
    return config


def test_a_segmenter_s_head_is_the_weights_one(fpn, capsys):
    path, model = fpn
    config = as_weights_have_it(config_of(path), None)
    assert (config.segmentation.head, config.segmentation.channels) == ("fpn", 8)
    said = capsys.readouterr().out
    assert "is of fpn of 8 channels on stvit_small, for images of 64 pixels" in said
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
    made = segmentation.create(config, mesh, 3, "")
    assert settings.of(made, "") == settings.of(model, "")


def test_what_is_stated_stays(fpn):
    """A width, and all of a segmenter's own where the network is named."""
    path, _ = fpn
    config = config_of(path)
    config.segmentation.channels = 16
    followed = as_weights_have_it(config, None)
    assert (followed.segmentation.head, followed.segmentation.channels) == ("fpn", 16)
    config.model.name = "stvit_tiny"
    followed = as_weights_have_it(config, None)
    assert (followed.segmentation.head, followed.image_size) == ("upernet", 64)


def test_a_run_that_has_begun_goes_on_with_its_own(fpn, tmp_path):
    """Though its weights are gone."""
    path, _ = fpn
    config = config_of(path)
    before = as_weights_have_it(config, None)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / workdir.CONFIG).write_text(before.to_json_best_effort())
    config.init_from = str(tmp_path / "gone")
    again = as_weights_have_it(config, tmp_path)
    again.init_from = before.init_from
    assert again == before
    older = {k: v for k, v in json.loads(before.to_json()).items() if k != "segmentation"}
    (tmp_path / workdir.CONFIG).write_text(json.dumps(older))
    assert as_weights_have_it(config, tmp_path).segmentation.head == "upernet"
