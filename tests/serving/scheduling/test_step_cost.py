"""What a step computes, and what it is learnt to cost."""

import random

import pytest

from serving.scheduling.step_cost import LearntCosts, StepCosts, StepSize

TRUE = StepCosts(fixed=35e-3, token=0.5e-3, context=3.5e-6, pair=0.8e-6)


def test_positions_that_chunks_see() -> None:
    """Tokens at 3, 4 and 5 see 4, 5 and 6 positions; with a window of 5 they see 4, 5 and 5."""
    assert StepSize().plus([(3, 3)], None) == (3, 0, 15)
    assert StepSize().plus([(3, 3)], 5) == (3, 0, 14)
    assert StepSize().plus([(8, 3)], 5) == (3, 0, 15)
    assert StepSize().plus([(9, 1), (0, 2), (20, 1)], None) == (4, 31, 3)
    assert StepSize().plus([(9, 1), (20, 1)], 5) == (2, 10, 0)
    for window in None, 1, 4, 7:
        for start in range(9):
            for length in range(2, 9):
                seen = sum(min(p + 1, window or 99) for p in range(start, start + length))
                assert StepSize().plus([(start, length)], window) == (length, 0, seen)


def test_side_by_side_the_larger_of_each_counts() -> None:
    assert StepSize(4, 9, 2).union(StepSize(5, 1, 3)) == (5, 9, 3)


def test_seconds_are_a_sum() -> None:
    assert StepCosts(1, 2, 3, 4).seconds(StepSize(10, 100, 1000)) == 1 + 20 + 300 + 4000


def learnt(seed: int) -> tuple[LearntCosts, StepSize]:
    """Costs learnt from short prompts, answers, and a long prompt beside them, with outliers."""
    dice, costs = random.Random(seed), LearntCosts()

    def measure(size: StepSize) -> None:
        late = 4 if dice.random() < 0.02 else 1 + abs(dice.gauss(0, 0.05))
        costs.learn(size, TRUE.seconds(size) * late)

    for i in range(16):
        measure(StepSize(128, 100 * i, 5000))
    for i in range(300):
        measure(StepSize(32, 16 * (100 + i), 0))
    for i in range(200):
        measure(StepSize(32, 6400, 0) if i % 17 == 16 else StepSize(64, 6400, 1500 * i))
    return costs, StepSize(64, 6400, 300_000)


@pytest.mark.parametrize("seed", range(5))
def test_costs_are_found_and_single_late_steps_do_not_count(seed: int) -> None:
    learner, last = learnt(seed)
    costs = learner.costs
    assert costs is not None
    for size in last, StepSize(32, 6400, 0):
        assert costs.seconds(size) == pytest.approx(TRUE.seconds(size), rel=0.15)
    assert costs.pair == pytest.approx(TRUE.pair, rel=0.15)


def test_a_machine_that_gets_slower_is_followed_and_one_that_gets_faster_at_once() -> None:
    learner, _ = learnt(0)
    size = StepSize(32, 6400, 0)
    for _ in range(60):
        learner.learn(size, 2 * TRUE.seconds(size))
    assert learner.costs is not None
    assert learner.costs.seconds(size) == pytest.approx(2 * TRUE.seconds(size), rel=0.1)
    for _ in range(60):
        learner.learn(size, TRUE.seconds(size))
    assert learner.costs.seconds(size) == pytest.approx(TRUE.seconds(size), rel=0.1)
    assert min(learner.costs) >= 0


def test_steps_with_long_chunks_say_nothing_of_what_all_steps_cost() -> None:
    learner, _ = learnt(0)
    before = learner.costs
    for _ in range(20):
        learner.learn(StepSize(64, 6400, 300_000), 1.0)
    after = learner.costs
    assert before is not None and after is not None
    assert (after.fixed, after.context) == (before.fixed, before.context)
    assert after.pair > 2 * before.pair
