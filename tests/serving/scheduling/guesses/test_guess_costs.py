"""What steps with guesses take beyond what their sizes tell."""

import pytest

from serving.scheduling.guesses.guess_costs import GuessCosts
from serving.scheduling.rhythm import Rhythm
from serving.scheduling.step_cost import StepSize


def test_a_ratio_is_learnt_for_each_power_of_two() -> None:
    costs = GuessCosts()
    assert costs.ratio(0) == costs.ratio(5) == 1.0
    costs.learn(5, 2.0)
    assert costs.ratio(4) == costs.ratio(7) == pytest.approx(1.3)
    assert costs.ratio(1) == costs.ratio(99) == pytest.approx(1.3)  # nothing nearer is known
    costs.learn(1, 1.3 - 0.5)
    assert costs.ratio(1) == pytest.approx(1.3 - 0.3 * 0.5)
    assert costs.ratio(5) == pytest.approx(1.3)
    assert costs.ratio(0) == 1.0


def test_a_step_that_was_held_up_counts_as_twice_as_long_at_most() -> None:
    costs = GuessCosts()
    costs.learn(4, 50.0)
    assert costs.ratio(4) == pytest.approx(1.3)


def test_what_did_not_pay_is_tried_again_later() -> None:
    """A hundredth of the way back to 1 with each step without guesses."""
    costs = GuessCosts()
    for _ in range(30):
        costs.learn(4, 3.0)
    assert costs.ratio(4) == pytest.approx(3.0, abs=0.01)
    for _ in range(100):
        costs.learn(0, 1.0)
    assert costs.ratio(4) == pytest.approx(1 + 2 * 0.99**100, abs=0.01)


def test_steps_with_guesses_teach_nothing_of_others() -> None:
    rhythm = Rhythm(2.0)
    size = StepSize(4, 100)
    rhythm.learn(size, 1.0)
    alone = rhythm.seconds(size)
    for _ in range(9):
        rhythm.learn(size, 5.0, guesses=3)
    assert rhythm.seconds(size) == alone
    assert rhythm.guess_costs.ratio(3) > 3
