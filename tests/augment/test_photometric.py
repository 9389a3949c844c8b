"""Photometric distortion: mmsegmentation's numbers, its draws, and that nothing else decides."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvit_jax.augment.photometric import Draws, _quotient, distort, draw, photometric

GOLDEN = Path(__file__).parents[1] / "golden/segmentation_transforms.npz"
RUNS = 12

jitted = jax.jit(distort)


def parsed(draws: np.ndarray) -> tuple[float | bool, ...]:
    """What mmsegmentation drew, in its order, a coin before every step, as `Draws` has it."""
    rest = iter(draws.tolist())

    def step(nothing: float) -> float:
        return next(rest) if next(rest) else nothing

    brightness = step(0)
    contrast_last = not next(rest)
    contrast = 1 if contrast_last else step(1)
    saturates = bool(next(rest))
    saturation = next(rest) if saturates else 1
    turns = bool(next(rest))
    hue = int(next(rest)) if turns else 0
    if contrast_last:
        contrast = step(1)
    assert not list(rest)
    return brightness, contrast, contrast_last, saturates, saturation, turns, hue


def golden() -> tuple[np.ndarray, Draws, np.ndarray]:
    with np.load(GOLDEN) as file:
        image = file["image_bgr"][..., ::-1]
        draws = zip(*(parsed(file[f"pmd{run}/draws"]) for run in range(RUNS)), strict=True)
        out = np.stack([file[f"pmd{run}/out"][..., ::-1] for run in range(RUNS)])
    fields = [np.array(field) for field in draws]
    fields = [f.astype(np.float32) if f.dtype == np.float64 else f for f in fields]
    return np.repeat(image[None], RUNS, 0), Draws(*fields), out


def test_the_levels_are_mmsegmentations() -> None:
    images, draws, expected = golden()
    out = np.asarray(jitted(images, draws))
    assert out.dtype == np.uint8
    difference = np.abs(out.astype(int) - expected)
    round_trips = draws.saturates.astype(int) + draws.turns
    assert (difference.max((1, 2, 3)) <= round_trips).all()
    assert np.mean(difference > 0) < 1e-3  # OpenCV's rounding, not only about its levels


@pytest.mark.parametrize(
    "top, bottoms", [(255 << 12, range(1, 256)), (180 << 12, range(6, 1531, 6))]
)
def test_quotients_are_those_of_doubles(top: int, bottoms: range) -> None:
    expected = np.rint(top / np.array(bottoms))
    np.testing.assert_array_equal(_quotient(top, jnp.array(bottoms)), expected)


def test_draws_are_uniform_with_a_coin_for_every_step() -> None:
    draws = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000))
    brightness, contrast, last, saturates, saturation, turns, hue = map(np.asarray, draws)
    for coin in (brightness != 0, contrast != 1, last, saturates, turns):
        assert abs(coin.mean() - 0.5) < 0.04
    for values, low, high in (
        (brightness[brightness != 0], -32, 32),
        (contrast[contrast != 1], 0.5, 1.5),
        (saturation, 0.5, 1.5),
    ):
        assert low <= values.min() and values.max() < high
        assert abs(np.mean((values - low) / (high - low)) - 0.5) < 0.04
    assert set(hue.tolist()) == set(range(-18, 18))
    together = np.corrcoef([brightness != 0, contrast != 1, last, saturates, turns])
    assert np.abs(together - np.eye(5)).max() < 0.08


def test_key_and_row_decide_alone() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 7, 3), np.uint8)
    rows = np.array([4, 1, 0, 5, 3, 2])
    program = jax.jit(photometric)
    whole = np.asarray(program(jax.random.key(1), images, np.arange(6)))
    np.testing.assert_array_equal(program(jax.random.key(1), images[rows], rows), whole[rows])
    assert (whole != images).any()
    assert (whole != program(jax.random.key(2), images, np.arange(6))).any()


def test_nothing_drawn_changes_nothing() -> None:
    images, draws, _ = golden()
    off = np.zeros(RUNS, bool)
    draws = draws._replace(brightness=np.zeros(RUNS, np.float32), saturates=off, turns=off)
    draws = draws._replace(contrast=np.ones(RUNS, np.float32))
    np.testing.assert_array_equal(jitted(images, draws), images)
