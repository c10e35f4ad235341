"""What a follower does not launch: each number that would index beyond a cache or a vocabulary."""

from dataclasses import replace
from typing import Any

import pytest

from mixtral_jax.sampling_params import SamplingParams
from serving.cluster.leader import GroupError
from serving.cluster.plan_check import PlanCheck
from serving.scheduling.step_plan import Chunk, Limits, StepPlan

# 10 pages of 4 tokens; 2 rows; 8 tokens a step; contexts of 12 tokens.
LIMITS = Limits(
    num_pages=10, page_size=4, max_sequences=2, max_step_tokens=8, max_context=12, max_waiting=9
)
VOCABULARY = 50
# Tokens 4 to 8 of a sequence, which need the pages of 9 tokens: 3.
CHUNK = Chunk(
    request_id="a",
    choice=0,
    token_ids=(1, 2, 3, 4, 49),
    start=4,
    pages=(0, 9, 3),
    follows=None,
    samples=True,
    sampling=SamplingParams(),
    seed=0,
    prompt_length=9,
    history=(),
    forbidden=frozenset(),
)


def plans(*chunks: Chunk, copies: tuple[tuple[int, int], ...] = ()) -> tuple[StepPlan, ...]:
    """One partition has these chunks, the other has none."""
    return (StepPlan(chunks=chunks, copies=copies), StepPlan(chunks=()))


def test_plans_within_the_bounds_pass() -> None:
    check = PlanCheck(LIMITS, 2, VOCABULARY)
    check.check(plans(CHUNK, copies=((9, 0),)))
    check.check(plans(replace(CHUNK, token_ids=(0,), pages=(0, 9), follows=0)))
    check.check(plans())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pages": (0, 10, 3)}, "a page of 10, where 9 is the most"),
        ({"pages": (0, -1, 3)}, "a page of -1"),
        ({"pages": (0, 9)}, "5 tokens with 2 pages that ends at 9"),
        ({"pages": (0, 9, 3, 4)}, "5 tokens with 4 pages"),
        ({"token_ids": ()}, "0 tokens with 3 pages"),
        ({"token_ids": (1, 2, 3, 4, 50)}, "a token id of 50, where 49 is the most"),
        ({"token_ids": (0,) * 9}, "a number of tokens of 9, where 8 is the most"),
        ({"start": 8}, "a chunk with an end of 13, where 12 is the most"),
        ({"history": (0,) * 13}, "a history of a chunk of 13, where 12"),
        ({"history": (50,)}, "a token id of 50"),
        ({"forbidden": frozenset({50})}, "a token id of 50"),
        ({"sampling": SamplingParams(logit_bias={50: 1.0})}, "a token id of 50"),
        ({"token_ids": (1,), "pages": (0, 9), "guesses": 1}, "a number of guesses of 1, where 0"),
        ({"guesses": 1, "samples": False}, "guesses behind a token that is not known"),
        ({"guesses": 1, "follows": 0}, "guesses behind a token that is not known"),
        ({"follows": 1}, "a chunk that follows one with the index of 1, where 0 is the most"),
    ],
)
def test_a_number_beyond_its_bound_is_named(changes: dict[str, Any], words: str) -> None:
    check = PlanCheck(LIMITS, 2, VOCABULARY)
    check.check(plans(CHUNK))
    with pytest.raises(GroupError, match=words):
        check.check(plans(replace(CHUNK, **changes)))


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (plans(CHUNK, CHUNK, CHUNK), "a number of chunks and guesses of 3, where 2"),
        (plans(replace(CHUNK, guesses=2)), "a number of chunks and guesses of 3, where 2"),
        (plans(copies=((0, 10),)), "a page of 10"),
        (plans()[:1], "1 plans for 2 partitions"),
        (plans() * 2, "4 plans for 2 partitions"),
    ],
)
def test_a_step_beyond_its_bounds_is_named(step: tuple[StepPlan, ...], words: str) -> None:
    small = replace(CHUNK, token_ids=(1,), pages=(0, 1))
    check = PlanCheck(replace(LIMITS, max_step_tokens=99), 2, VOCABULARY)
    check.check(plans(small))
    with pytest.raises(GroupError, match=words):
        check.check(step)
