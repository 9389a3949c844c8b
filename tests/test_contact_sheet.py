"""The contact sheet: the loader's images before, the augmented ones after, true captions."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from stvit_jax import contact_sheet
from stvit_jax.contact_sheet import GAP, GROUP_SIZE, GROUPS, LINE, TILE
from stvit_jax.data import class_lists
from stvit_jax.data.examples import Examples
from stvit_jax.data.loader import train_batches
from stvit_jax.data.order import Order
from stvit_jax.data.sources import open_source
from stvit_jax.errors import UserError
from stvit_jax.tasks import classification
from tests import mini_ade
from tests.mini_sets import picture

ROOT = Path(__file__).parents[1]
PLAIN = ("--config.augment.mixup=False",)


def tile(sheet: Image.Image, group: int, slot: int, after: bool) -> np.ndarray:
    left = GAP + group * (2 * TILE + 3 * GAP) + after * (TILE + GAP)
    top = LINE + 2 * GAP + slot * (TILE + 2 * LINE + GAP)
    return np.asarray(sheet.crop((left, top, left + TILE, top + TILE)), np.int32)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Runs the command with these arguments; returns the file that it was to write."""

    def run(*arguments: str) -> Path:
        output = tmp_path / "sheet.png"
        monkeypatch.chdir(ROOT)
        contact_sheet.main(["--output", str(output), *arguments])
        return output

    return run


def test_shows_every_image_of_the_batch_before_and_after(run, digits_dir: Path) -> None:
    where = f"--config.data.dir={digits_dir}"
    sheet = Image.open(run("configs/digits.py", where, *PLAIN, "--config.data.repeats=3"))
    source = open_source("tfds", "digits", str(digits_dir), train=True)
    order = Order(len(source), GROUPS * GROUP_SIZE, GROUP_SIZE, repeats=3)
    load = partial(classification.load, image_size=32, flip=False, classes=10)
    spec = {"image": ((32, 32, 3), np.uint8), "label": ((), np.int32)}
    batches = train_batches(Examples(source, load, spec), order)
    images = next(batches)["image"]
    batches.close()
    for number, image in enumerate(images):
        expected = np.asarray(Image.fromarray(image).resize((TILE, TILE), Image.Resampling.NEAREST))
        for after in (False, True):  # without augmentation both are the image
            shown = tile(sheet, *divmod(number, GROUP_SIZE), after)
            np.testing.assert_allclose(shown, expected, atol=after)


def test_the_published_recipe_shows_an_image_in_every_group(run, tmp_path: Path) -> None:
    """All of it but RandAugment, which takes long to compile."""
    for split in ("train", "val"):
        for number in range(2 * GROUP_SIZE):
            path = tmp_path / split / f"n{number:02}" / "1.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (50, 40), (20 * number, 250 - 20 * number, 99)).save(path)
    folder = ("--config.data.source=folder", f"--config.data.dir={tmp_path}")
    quick = ("--config.image_size=64", "--config.augment.randaugment=False")
    sheet = Image.open(run("configs/stvit_small.py", *folder, *quick))
    shown = np.array(
        [
            [tile(sheet, group, slot, False).mean(axis=(0, 1)) for slot in range(GROUP_SIZE)]
            for group in range(GROUPS)
        ]
    )
    assert np.ptp(shown, axis=0).max() < 1 and len(np.unique(shown[0].round(), axis=0)) == 6
    mixed = [tile(sheet, group, 0, True).mean(axis=(0, 1)) for group in range(GROUPS)]
    assert np.abs(mixed - shown[:, 0]).max(axis=1).min() > 1


@pytest.mark.parametrize("config", ["digit_scenes", "upernet_small"])
def test_scenes_are_shown_under_their_classes(run, config: str, tmp_path: Path) -> None:
    mini_ade.write(tmp_path / "data")
    where = ("--config.data.source=ade20k", f"--config.data.dir={tmp_path / 'data'}")
    sizes = ("image_size", "segmentation.short_side", "segmentation.long_side")
    small = (f"--config.{field}=64" for field in sizes)
    plain = ("--config.segmentation.photometric=False", "--config.data.workers=0")
    sheet = Image.open(run(f"configs/{config}.py", *where, *small, *plain))
    palette = class_lists.ade20k()[1]
    for group in range(GROUPS):
        before, after = tile(sheet, group, 0, False), tile(sheet, group, 0, True)
        colour = 2 * after - before  # what half of was mixed in, where a pixel has a class
        near = np.abs(colour[:, :, None] - palette[[0, 2, 4, 12, 20]]).max(axis=-1) <= 3
        assert near.any(axis=-1).mean() > 0.4 and near[..., :2].any()


def test_augmentation_shows_in_the_second_of_a_pair(run, digits_dir: Path) -> None:
    erased = "--config.augment.erasing_probability=1.0"
    where = f"--config.data.dir={digits_dir}"
    sheet = Image.open(run("configs/digits.py", where, *PLAIN, erased))
    for group in range(GROUPS):
        before, after = tile(sheet, group, 0, False), tile(sheet, group, 0, True)
        assert 0.01 < np.mean(np.abs(before - after) > 20) < 0.5


def test_captions_name_what_an_image_is_trained_on() -> None:
    def captions(target: list[float], smoothing: float) -> list[str]:
        def augment(*_):
            return jnp.zeros((1, 8, 8, 3)), jnp.asarray([target])

        batch = {"image": np.zeros((1, 8, 8, 3), np.uint8), "label": np.array([0])}
        classes = tuple("abcd")[: len(target)]
        ((before, after),) = classification.sheet(
            augment, classes, smoothing, batch, jax.random.key(0)
        )
        assert before[1] == ["a"]
        return after[1]

    assert captions([0.02, 0.29, 0.02, 0.67], 0.08) == ["d: 0.67", "b: 0.29"]
    assert captions([0.95, 0.05], 0.1) == ["a: 0.95"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/digit.py"], "there is no config 'configs/digit.py'"),
        (["configs/digits.py", "--config.image_sise=3"], "did you mean config.image_size?"),
        (["configs/digits.py", "--config.data.source=folder"], "data.dir is empty"),
        (["configs/stvit_small.py:385"], "config argument '385' is unknown"),
    ],
)
def test_mistakes_are_one_line(run, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as stopped:
        run(*arguments)
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value) and "\\n" not in str(stopped.value)


def test_a_set_of_one_image_and_a_folder_that_is_not_there(run, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "1.png").write_bytes(picture(1, form="PNG"))
    folder = ("--config.data.source=folder", f"--config.data.dir={tmp_path}")
    run("configs/digits.py", *folder)
    with pytest.raises(UserError, match="nowhere does not exist: create it, or correct --output"):
        run("configs/digits.py", "--output", str(tmp_path / "nowhere" / "sheet.png"))
