"""The fifteen ops of RandAugment by name, in the order that draws number them by."""

import functools

import jax
import jax.numpy as jnp

OPS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "ColorIncreasing",
    "ContrastIncreasing",
    "BrightnessIncreasing",
    "SharpnessIncreasing",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
NO_OP = -1  # the op index of a sample that a round leaves alone
MAX_MAGNITUDE = 10.0


def is_one_of(op: jax.Array, *names: str) -> jax.Array:
    """Whether each sample's op is one of `names`."""
    return functools.reduce(jnp.logical_or, (op == OPS.index(name) for name in names))
