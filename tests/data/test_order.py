"""The order of training images against a loop written from the recipe's sentences."""

import numpy as np
import pytest

from stvit_jax.data.order import Order, image_rng, permutation
from stvit_jax.errors import UserError


def slow_epoch(
    size: int, batch: int, group: int, repeats: int, seed: int, epoch: int
) -> list[list[tuple[int, int]]]:
    """Batches of (index, copy): permute, repeat in a row, deal round-robin to the groups."""
    positions = [(int(i), c) for i in permutation(size, seed, epoch) for c in range(repeats)]
    keep = size if repeats == 1 or size < 256 else size // 256 * 256
    groups = batch // (group or batch)
    dealt: list[list[tuple[int, int]]] = [[] for _ in range(groups)]
    for number, position in enumerate(positions[:keep]):
        dealt[number % groups].append(position)
    per_step = batch // groups
    return [
        [dealt[g][step * per_step + j] for g in range(groups) for j in range(per_step)]
        for step in range(keep // batch)
    ]


@pytest.mark.parametrize(
    ("size", "batch", "group", "repeats"),
    [
        (1000, 64, 16, 3),
        (1000, 64, 0, 3),
        (1437, 96, 32, 3),
        (1437, 96, 8, 1),
        (100, 24, 8, 3),
        (100, 24, 24, 1),
        (256, 256, 128, 3),
    ],
)
def test_order_is_the_slow_loop(size: int, batch: int, group: int, repeats: int) -> None:
    order = Order(size, batch, group, repeats, seed=7)
    for epoch in (0, 3):
        expected = slow_epoch(size, batch, group, repeats, 7, epoch)
        assert order.steps_per_epoch == len(expected)
        for step, slots in enumerate(expected):
            positions = order.positions(step, np.arange(batch))
            index, copy = order.images(epoch, positions)
            assert list(zip(index.tolist(), copy.tolist(), strict=True)) == slots
            some = order.positions(step, np.arange(batch)[3:9])
            np.testing.assert_array_equal(some, positions[3:9])


def test_imagenet_epoch_is_the_published_one() -> None:
    order = Order(1_281_167, 1024, 128)
    assert order.steps_per_epoch == 1251
    assert order.positions_per_epoch == 1_281_024


def test_copies_of_an_image_fall_into_different_groups() -> None:
    order = Order(100_000, 1024, 128)
    index, copy = order.images(0, order.positions(5, np.arange(1024)))
    assert 341 <= len(np.unique(index)) <= 343
    assert set(copy.tolist()) == {0, 1, 2}
    for group in index.reshape(8, 128):
        assert len(np.unique(group)) == 128


def test_without_repeats_an_epoch_visits_every_image_once() -> None:
    order = Order(1024, 64, 16, repeats=1)
    index, copy = order.images(2, np.arange(order.positions_per_epoch))
    assert sorted(index.tolist()) == list(range(1024))
    assert not copy.any()


def test_permutation_never_changes() -> None:
    """These numbers are the contract: a run that is resumed with newer libraries goes on alike."""
    assert permutation(10, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert permutation(10, 0, 1).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert permutation(10, 1, 0).tolist() == [3, 5, 2, 9, 7, 0, 8, 6, 1, 4]
    assert sorted(permutation(5000, 3, 4).tolist()) == list(range(5000))


def test_random_choices_depend_on_every_part_of_the_key() -> None:
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    draws = [image_rng(*key).random(4).tolist() for key in keys]
    assert draws == [image_rng(*key).random(4).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == len(keys)
    raw = np.random.Philox(counter=[0, 5, 2, 1], key=[11, 4]).random_raw(3).tolist()
    assert image_rng(11, 4, 5, 2).bit_generator.random_raw(3).tolist() == raw


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_set_smaller_than_a_batch_is_taken_again(repeats: int) -> None:
    """Alike as far as it goes, and no draw twice."""
    order = Order(5, 16, repeats=repeats)
    assert (order.steps_per_epoch, order.positions_per_epoch) == (1, 16)
    index, copy = order.images(4, order.positions(0, np.arange(16)))
    counts = np.bincount(index, minlength=5)
    assert counts.sum() == 16 and counts.max() - counts.min() <= repeats
    assert len(set(zip(index.tolist(), copy.tolist(), strict=True))) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 128, 0, 3), "no images to train on"),
        ((1000, 96, 64, 3), "group_size 64 does not divide batch_size 96"),
    ],
)
def test_impossible_orders_say_what_to_change(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Order(*arguments)
