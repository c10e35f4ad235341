"""Prompts beside answers, bounded by time, with costs that can be added up by hand.

A step costs 10 and 1 more for each token, and 0.1 for each pair of positions in longer chunks.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from serving.scheduling.partitions import Partitions
from serving.scheduling.request import Drawn, Priority, Request
from serving.scheduling.rhythm import Rhythm
from serving.scheduling.step_cost import LearntCosts, StepCosts
from serving.scheduling.step_plan import StepPlan
from tests.serving.scheduling.plain_device import limits, request

COSTS = StepCosts(fixed=10, token=1, context=0, pair=0.1)
LIMITS = limits(num_pages=99, max_sequences=4, max_step_tokens=24, max_context=300, max_waiting=9)


class KnownCosts(LearntCosts):
    """Costs that stay as they are given."""

    def __init__(self, costs: StepCosts = COSTS) -> None:
        super().__init__()
        self.costs = costs


def partitions_of(rhythm: Rhythm | None, *requests: Request, count: int = 1) -> Partitions:
    partitions = Partitions(LIMITS, count, rhythm=rhythm)
    for one in requests:
        partitions.add(one)
    return partitions


def step(partitions: Partitions) -> dict[str, tuple[int, int]]:
    """Does a step; returns the start and length of each request's chunk."""
    plans = partitions.plan()
    drawn = [[Drawn(token_id=5) if c.samples else None for c in plan.chunks] for plan in plans]
    partitions.commit(plans, drawn)
    return chunks(*plans)


def chunks(*plans: StepPlan) -> dict[str, tuple[int, int]]:
    return {c.request_id: (c.start, len(c.token_ids)) for plan in plans for c in plan.chunks}


def test_chunks_take_the_time_that_the_bound_leaves_and_get_smaller_along_the_prompt() -> None:
    """A answers: alone a step takes 11, and 22 with prompts at most.

    From 0 on, 7 tokens see 28 positions: 11 + 7 + 2.8 = 20.8; with 8 it would be 22.6. From 7 on,
    5 tokens see 50 positions: 11 + 5 + 5 = 21; with 6 it would be 23.3. From 25 on 2 tokens see 53,
    and take 18.3; with 3 it would be 22.1.
    """
    partitions = partitions_of(Rhythm(2, costs=KnownCosts()), request("A", 1, 90))
    step(partitions)
    partitions.add(request("B", 60, 9))
    sizes = [step(partitions)["B"] for _ in range(9)]
    assert sizes[:2] == [(0, 7), (7, 5)]
    assert (22, 3) in sizes and (25, 2) in sizes
    lengths = [length for _, length in sizes]
    assert lengths == sorted(lengths, reverse=True)


def test_without_answers_or_a_bound_or_a_measured_step_prompts_fill_it() -> None:
    alone = partitions_of(Rhythm(2, costs=KnownCosts()), request("B", 60, 9))
    assert step(alone) == {"B": (0, 24)}
    for rhythm in None, Rhythm(math.inf, costs=KnownCosts()), Rhythm(2):
        beside = partitions_of(rhythm, request("A", 1, 90))
        step(beside)
        beside.add(request("B", 60, 9))
        assert step(beside) == {"A": (1, 1), "B": (0, 23)}


def test_an_answer_whose_guesses_are_being_checked_counts_as_one_that_goes_on() -> None:
    """It is not in the next step, because its last token is not known, but waits for its end."""

    class Fives:
        chance = 1.0

        def guess(self, tokens: Sequence[int], count: int) -> Sequence[int]:
            return [5] * min(count, 3)

    rhythm = Rhythm(2, costs=KnownCosts())
    partitions = Partitions(LIMITS, 1, lambda request: Fives(), rhythm)
    partitions.add(request("A", 1, 90))
    assert step(partitions) == {"A": (0, 1)}
    plans = partitions.plan()
    assert chunks(*plans) == {"A": (1, 4)}
    partitions.add(request("B", 60, 9))
    assert chunks(*partitions.plan()) == {"B": (0, 7)}


def test_padding_is_filled_because_it_is_paid_for() -> None:
    """Steps have 1, 16 or 24 tokens: 11 alone, 26 and more with 16, so 2.8 times 11 allows 16."""
    rhythm = Rhythm(2.8, (1, 16, 24), KnownCosts(replace_pair(0)))
    partitions = partitions_of(rhythm, request("A", 1, 90))
    step(partitions)
    partitions.add(request("B", 60, 9))
    assert step(partitions) == {"A": (1, 1), "B": (0, 15)}


def replace_pair(seconds: float) -> StepCosts:
    return COSTS._replace(pair=seconds)


def test_a_prompt_goes_on_by_a_token_where_even_that_takes_too_long() -> None:
    rhythm = Rhythm(1.1, costs=KnownCosts(COSTS._replace(token=100)))
    partitions = partitions_of(rhythm, request("A", 1, 90))
    step(partitions)
    partitions.add(request("B", 60, 9))
    assert step(partitions) == {"A": (1, 1), "B": (0, 1)}


def test_every_seventeenth_step_is_of_answers_alone() -> None:
    partitions = partitions_of(Rhythm(1.2, costs=KnownCosts()), request("A", 1, 200))
    step(partitions)
    partitions.add(request("B", 60, 9))
    had = ["B" in step(partitions) for _ in range(40)]
    assert [i for i, has_prompt in enumerate(had) if not has_prompt] == [16, 33]


def test_nobody_waits_for_answers_of_batches_but_these_wait_for_others() -> None:
    batch = replace(request("A", 1, 90), priority=Priority.BATCH)
    partitions = partitions_of(Rhythm(2, costs=KnownCosts()), batch)
    step(partitions)
    partitions.add(request("B", 60, 9))
    assert step(partitions) == {"A": (1, 1), "B": (0, 23)}


def test_answers_of_another_partition_wait_for_the_same_step() -> None:
    partitions = partitions_of(Rhythm(2, costs=KnownCosts()), request("A", 1, 90), count=2)
    step(partitions)
    partitions.add(request("B", 60, 9))
    # The slower of the two parts counts: B's 8 tokens with 36 pairs take 10 + 8 + 3.6.
    assert step(partitions) == {"A": (1, 1), "B": (0, 8)}


def test_callers_have_their_shares_of_a_bounded_step() -> None:
    """There is time for 12 tokens, and two callers were served alike."""
    rhythm = Rhythm(2, costs=KnownCosts(replace_pair(0)))
    partitions = partitions_of(rhythm, request("A", 1, 90), request("D", 1, 90))
    step(partitions)
    partitions.add(request("B", 60, 9, caller="b"))
    partitions.add(request("C", 60, 9, caller="c"))
    assert step(partitions) == {"A": (1, 1), "D": (1, 1), "B": (0, 6), "C": (0, 6)}


def test_short_prompts_are_not_held_back_but_for_a_long_one_among_them() -> None:
    """48 tokens are two full steps; a bound of 2 has room for 11 tokens, were they not so few."""
    partitions = partitions_of(Rhythm(2, costs=KnownCosts(replace_pair(0))), request("A", 1, 90))
    step(partitions)
    partitions.add(request("B", 48, 9))
    assert step(partitions) == {"A": (1, 1), "B": (0, 23)}
    partitions = partitions_of(Rhythm(2, costs=KnownCosts(replace_pair(0))), request("A", 1, 90))
    step(partitions)
    partitions.add(request("B", 49, 9))
    assert step(partitions) == {"A": (1, 1), "B": (0, 11)}


def test_a_step_may_take_longer_where_more_wait_than_have_answers() -> None:
    """Alone a step takes 11. For one of them who waits 13.2 are allowed, and for three 39.6."""
    few, many = (Rhythm(1.2, costs=KnownCosts(replace_pair(0))) for _ in range(2))
    for rhythm, names, tokens in (few, "B", 2), (many, "BCD", 23):
        partitions = partitions_of(rhythm, request("A", 1, 90))
        step(partitions)
        for name in names:
            partitions.add(request(name, 60, 9))
        sizes = step(partitions)
        assert sum(length for _, length in sizes.values()) == 1 + tokens
