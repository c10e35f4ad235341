"""Rows are full, every example comes once an epoch, and a step's rows follow from numbers alone."""

import numpy as np
import pytest

from mixtral_jax.training.example import Example
from mixtral_jax.training.packing import PackedData, best_fit


def examples_of(lengths: list[int]) -> list[Example]:
    """Examples that are told apart by their ids."""
    return [
        Example(np.full(length, number, np.int32), np.ones(length, np.float32))
        for number, length in enumerate(lengths)
    ]


def chat_lengths(count: int) -> list[int]:
    """Lengths as chats have them: many short ones, a few of thousands."""
    draw = np.random.default_rng(3)
    return np.clip(draw.lognormal(5.5, 0.9, count), 12, 2048).astype(int).tolist()


def test_the_fullest_row_with_room_is_taken() -> None:
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit([10, 9, 1], 10) == [[0], [1, 2]]


@pytest.mark.parametrize("length", [2048, 4096])
def test_chats_fill_95_percent_of_the_positions(length: int) -> None:
    data = PackedData(examples_of(chat_lengths(2000)), length, 8, seed=0)
    assert data.share_used >= 0.95
    batch = data.batch(0)
    assert (batch.segments > 0).mean() >= 0.9  # that of all steps is 0.95


def test_every_example_comes_once_an_epoch_in_another_order_each_time() -> None:
    data = PackedData(examples_of([5, 3, 3, 3, 2, 7, 7, 1]), 10, 2, seed=1)
    epochs = []
    for epoch in range(3):
        steps = range(epoch * data.num_steps, (epoch + 1) * data.num_steps)
        rows = [row for step in steps for row in data.rows(step)]
        assert sorted(i for row in rows for i in row) == list(range(8))
        epochs.append(rows)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_step_is_a_function_of_the_seed_and_its_number() -> None:
    lengths = chat_lengths(100)
    first, second = (PackedData(examples_of(lengths), 2048, 4, seed=5) for _ in range(2))
    far = [first.rows(step) for step in (0, 3, 40, 3)]
    assert [second.rows(step) for step in (40, 3, 0)] == [far[2], far[1], far[0]]
    other = PackedData(examples_of(lengths), 2048, 4, seed=6)
    assert other.rows(0) != first.rows(0)
    assert other.num_steps == first.num_steps  # the rows' shapes follow from the lengths


def test_hosts_take_their_rows_of_the_same_batch() -> None:
    data = PackedData(examples_of(chat_lengths(60)), 2048, 4, seed=5)
    whole = data.batch(1)
    halves = [data.batch(1, slice(0, 2)), data.batch(1, slice(2, 4))]
    for name, arrays in zip(whole._fields, zip(*halves, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(arrays), getattr(whole, name))


def test_the_last_step_is_filled_with_empty_rows() -> None:
    data = PackedData(examples_of([10, 10, 10]), 10, 2, seed=0)
    assert (data.num_rows, data.num_steps) == (3, 2)
    assert data.rows(1)[1] == []
    assert data.batch(1).segments.sum(axis=1).tolist() == [10, 0]


def test_evaluation_keeps_its_order() -> None:
    data = PackedData(examples_of([3, 2, 3]), 6, 1, seed=0, is_shuffled=False)
    assert [data.rows(step) for step in range(4)] == [[[0, 2]], [[1]], [[0, 2]], [[1]]]


def test_the_order_is_pinned() -> None:
    data = PackedData(examples_of([1] * 8), 2, 4, seed=2026)
    assert data.rows(0) == [[2, 5], [7, 3], [4, 6], [1, 0]]  # resumed runs depend on it
