"""What users hand to a network: settings meant or refused by name, inputs, ways to call."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from PIL import Image

import stvit_jax
from stvit_jax.errors import UserError
from stvit_jax.models import settings
from stvit_jax.models.checks import setting
from stvit_jax.models.stvit import STViT

ENDLESS = [1]
for _ in range(40):
    ENDLESS = [ENDLESS, ENDLESS]


@pytest.mark.parametrize(
    "field, given, meant",
    [
        ("num_classes", np.int64(7), 7),
        ("num_classes", np.array(7), 7),
        ("num_classes", jnp.array(7), 7),
        ("group_size", np.uint8(4), 4),
        ("depths", [1, 2, 2, 1], (1, 2, 2, 1)),
        ("depths", np.array([1, 2, 2, 1]), (1, 2, 2, 1)),
        ("depths", jnp.array([1, 2, 2, 1]), (1, 2, 2, 1)),
        ("depths", [np.int32(1), 2, 2, np.int64(1)], (1, 2, 2, 1)),
        ("stoken_size", (x for x in (4, 2, 1, 1)), (4, 2, 1, 1)),
        ("layerscale", np.array([False, True, False, True]), (False, True, False, True)),
        ("layerscale", [0, 0, 1, 1], (False, False, True, True)),
        ("qkv_bias", np.False_, False),
        ("mlp_ratio", 4, 4),
        ("mlp_ratio", np.float32(2.5), 2.5),
        ("drop_path_rate", np.array(0.25), 0.25),
        ("init_values", np.float64(1e-6), 1e-6),
        ("dtype", "bfloat16", jnp.bfloat16),
        ("dtype", jnp.bfloat16, jnp.bfloat16),
        ("dtype", np.dtype("float32"), jnp.float32),
        ("dtype", np.float16, jnp.float16),
    ],
)
def test_settings_are_taken_as_meant(field, given, meant):
    model = stvit_jax.create_model("stvit_tiny", **{field: given})
    value = getattr(model, field)
    assert value == meant
    if field != "dtype":
        assert type(value) is type(meant)
        assert not isinstance(meant, tuple) or [*map(type, value)] == [*map(type, meant)]
    assert hash(model) == hash(model.clone())


WHOLE = (10.0, "10", True, None, np.float32(10), np.array([10]), 0, -1, 1j, [10])
WHOLES = (
    2,
    "1221",
    (1, 2, 2.0, 1),
    np.array([1.0, 2.0]),
    {1, 2},
    {1: 2},
    (),
    None,
    b"1221",
    ENDLESS,
)
REFUSED = {
    **dict.fromkeys(("projection", "in_chans"), WHOLE),
    "num_classes": ("7", 7.0, None, -1, True),
    "features_only": ("False", None, 2, [True]),
    **dict.fromkeys(("depths", "embed_dim", "num_heads", "n_iter", "stoken_size"), WHOLES),
    "group_size": (2.0, "2", -1, None, True),
    "kernels": ("mosaic_gpu", None, 1, ("plain", "plain")),
    "remat": (0, "0", (-1,), (1.0,), (True,), None),
    "layerscale": (True, "0011", [None] * 4, [0, 0, 2, 2], [0.5] * 4, None),
    **dict.fromkeys(("qkv_bias", "freeze_bn"), ("False", None, 2, 1.0, [True])),
    "mlp_ratio": ("4", None, 0, -1, float("nan"), float("inf"), True, [4], 10**400),
    "init_values": ("1e-6", None, float("nan"), [1e-6]),
    "drop_path_rate": ("0.1", None, 1, -0.1, float("nan"), [0.1]),
    "dtype": ("f32", None, int, jnp.int8, torch.float32, "float8_e4m3fn", complex, 32),
}


def test_every_setting_is_tried():
    assert {*REFUSED, "parent", "name", "folded"} == set(STViT.__dataclass_fields__)


@pytest.mark.parametrize("field", REFUSED)
def test_what_no_setting_can_be_is_refused_by_name(field):
    for value in REFUSED[field]:
        with pytest.raises(UserError) as caught:
            stvit_jax.create_model("stvit_tiny", **{field: value})
        message = str(caught.value)
        assert re.match(rf"model\.{field} is .+: it must be .+", message)
        assert len(message) < 450 and message.isprintable()


def test_a_setting_says_what_was_given_and_what_it_must_be():
    with pytest.raises(UserError) as caught:
        setting("projection", 10.0)
    assert str(caught.value) == "model.projection is 10.0: it must be a whole number, at least 1"
    with pytest.raises(UserError) as caught:
        setting("depths", 2)
    assert str(caught.value) == (
        "model.depths is 2: it must be a whole number, at least 1, for each stage, as (1, 2, 2, 1)"
    )


@pytest.mark.parametrize("name", [None, 3, ["stvit_tiny"], {}, b"stvit_tiny"])
def test_a_name_that_is_no_string_is_refused(name):
    with pytest.raises(UserError, match="a model's name is of type .*; known: stvit_base, "):
        stvit_jax.create_model(name)


@pytest.fixture(scope="module")
def tiny():
    model = stvit_jax.create_model("stvit_tiny", drop_path_rate=0.1, group_size=2)
    return model, settings.abstract(model)


def result_of(model, variables, images, **how):
    """The shapes that a call results in; `images` are an argument, or part of the program."""
    if isinstance(images, np.ndarray | jax.Array):
        return jax.eval_shape(partial(model.apply, **how), variables, images)
    return jax.eval_shape(lambda v: model.apply(v, images, **how), variables)


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "longdouble", ml_dtypes.bfloat16], ids=str
)
def test_floats_of_every_width_are_taken(tiny, dtype):
    model, variables = tiny
    images = np.zeros((2, 32, 32, 3), dtype)
    traced = jnp.asarray(images, "float32" if dtype == "longdouble" else None)
    assert result_of(model, variables, traced).shape == (2, 10)
    inside = jax.eval_shape(lambda v: model.apply(v, images), variables)
    assert inside.shape == (2, 10) and inside.dtype == jnp.float32


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (0, 32, 32, 3), (2, 1, 90, 3), (1, 33, 7, 3)])
def test_images_of_any_size_and_number_are_taken(tiny, shape):
    model, variables = tiny
    assert result_of(model, variables, np.zeros(shape, np.float32)).shape == (shape[0], 10)


IMAGES = {
    "pixels": (np.zeros((2, 32, 32, 3), np.uint8), "call stvit_jax.data.normalize(images) first"),
    "integers": (np.zeros((2, 32, 32, 3), np.int64), "call stvit_jax.data.normalize"),
    "booleans": (np.zeros((2, 32, 32, 3), bool), "bool (2, 32, 32, 3)"),
    "complex": (np.zeros((2, 32, 32, 3), np.complex64), "complex64 (2, 32, 32, 3)"),
    "channels first": (np.zeros((2, 3, 32, 32), np.float32), "images.transpose(0, 2, 3, 1)"),
    "one image": (np.zeros((32, 32, 3), np.float32), "add the batch axis, images[None]"),
    "one, channels first": (np.zeros((3, 32, 32), np.float32), "images.transpose(1, 2, 0)[None]"),
    "grey": (np.zeros((2, 32, 32, 1), np.float32), "images.repeat(3, axis=-1)"),
    "grey without channel": (np.zeros((2, 32, 32), np.float32), "takes normalised (B, H, W, 3)"),
    "with alpha": (np.zeros((2, 32, 32, 4), np.float32), "images[..., :3]"),
    "five axes": (np.zeros((1, 2, 32, 32, 3), np.float32), "float32 (1, 2, 32, 32, 3)"),
    "a number": (np.float32(1).reshape(()), "float32 ()"),
    "no pixel": (np.zeros((2, 0, 32, 3), np.float32), "of one pixel or more"),
    "torch": (torch.zeros(2, 32, 32, 3), "images are a torch.Tensor"),
    "list": ([[[[0.0, 0.0, 0.0]]]], "images are of type list"),
    "picture": (Image.new("RGB", (32, 32)), "images are of type Image"),
    "nothing": (None, "images are of type NoneType"),
}


@pytest.mark.parametrize("images, message", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("method", ["__call__", "features", "feature_maps"])
def test_what_are_no_images_is_refused_with_the_remedy(tiny, method, images, message):
    with pytest.raises(UserError, match=re.escape(message)):
        result_of(*tiny, images, method=method)


def test_initialising_checks_its_images_too(tiny):
    model, _ = tiny
    with pytest.raises(UserError, match="normalize"):
        jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.uint8))


BATCH = np.zeros((2, 32, 32, 3), np.float32)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: {"params": v["params"]}, "the variables hold no 'batch_stats'"),
        (lambda v: {"batch_stats": v["batch_stats"]}, "the variables hold no 'params'"),
        (lambda v: v["params"], "the variables hold no 'params'"),
        (lambda v: {}, "the variables hold no 'params'"),
        (lambda v: {**v, "batch_stats": {}}, "the variables hold no 'batch_stats'"),
    ],
)
def test_variables_without_a_collection_are_refused(tiny, train, change, message):
    model, variables = tiny
    how = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(0)}} if train else {}
    with pytest.raises(UserError, match=message):
        result_of(model, change(variables), BATCH, train=train, **how)


KEY = jax.random.key(0)
RIGHT = {"mutable": ["batch_stats"], "rngs": {"dropout": KEY}}


@pytest.mark.parametrize(
    "batch, how, message",
    [
        (2, RIGHT | {"mutable": False}, "mutable=['batch_stats']"),
        (2, RIGHT | {"mutable": ["intermediates"]}, "mutable=['batch_stats']"),
        (2, RIGHT | {"rngs": {}}, "rngs={'dropout': key}"),
        (2, RIGHT | {"rngs": {}, "drop_path_rate": jnp.float32(0)}, "rngs={'dropout': key}"),
        (2, RIGHT | {"drop_path_rate": 1.0}, "drop_path_rate is 1.0: it must be in [0, 1)"),
        (2, RIGHT | {"drop_path_rate": np.float32("nan")}, "drop_path_rate is nan"),
        (3, RIGHT, "a batch of 3 images cannot be trained on in groups of 2"),
        (0, RIGHT, "a batch of 0 images"),
    ],
)
def test_training_calls_that_cannot_succeed_are_refused(tiny, batch, how, message):
    with pytest.raises(UserError, match=re.escape(message)):
        result_of(*tiny, np.zeros((batch, 32, 32, 3), np.float32), train=True, **how)


def test_training_calls_that_can_succeed_are_not(tiny):
    model, variables = tiny
    without_keys = {"mutable": ["batch_stats"], "drop_path_rate": 0.0}
    for how in (RIGHT, without_keys, {"mutable": True, "rngs": {"params": KEY}}):
        logits, new = result_of(model, variables, BATCH, train=True, **how)
        assert logits.shape == (2, 10) and "batch_stats" in new
    for train in (False, True):  # keys of `init` serve drop path, too
        ours = jax.eval_shape(partial(model.init, train=train), KEY, BATCH)
        assert jax.tree.structure(ours) == jax.tree.structure(variables)
    _, ours = jax.eval_shape(
        partial(model.apply, mutable=["params", "batch_stats"], rngs={"params": KEY}), {}, BATCH
    )
    assert jax.tree.structure(ours) == jax.tree.structure(variables)


def test_float64_without_x64_is_refused(tiny):
    model = stvit_jax.create_model("stvit_tiny", dtype=jnp.float64)
    with pytest.raises(UserError, match="jax_enable_x64"):
        result_of(model, tiny[1], BATCH)
    with jax.enable_x64(True):
        assert result_of(model, tiny[1], BATCH).dtype == jnp.float64
