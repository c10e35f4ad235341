"""What is guessed from earlier tokens, by hand, and how the chance moves."""

from dataclasses import replace

import pytest

from mixtral_jax.sampling_params import SamplingParams
from serving.scheduling.guesses.lookup import LookUp
from serving.scheduling.request import Request


@pytest.mark.parametrize(
    ("tokens", "count", "guesses"),
    [
        ([5, 6, 7, 8, 9, 5, 6, 7], 2, (8, 9)),
        ([5, 6, 7, 8, 9, 5, 6, 7], 7, (8, 9, 5, 6, 7, 8, 9)),  # in circles
        ([5, 6, 7, 8, 9, 6, 7], 2, ()),  # two tokens are too few
        ([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 1, (5,)),  # of equal matches the last
        ([0, 1, 2, 3, 4, 9, 1, 2, 3, 5, 0, 1, 2, 3], 1, (4,)),  # a longer match before that
        ([1, 2, 3], 4, ()),
        ([4, 4, 4, 4], 3, (4, 4, 4)),
        ([1, 2, 3, 1, 2, 3], 0, ()),
        ([7], 4, ()),
        ([*range(100, 2000), 500, 501, 502], 3, (503, 504, 505)),
    ],
)
def test_what_followed_the_last_tokens_before(
    tokens: list[int], count: int, guesses: tuple[int, ...]
) -> None:
    assert LookUp().guess(tokens, count) == guesses


def test_tokens_that_come_piece_by_piece_count_like_those_at_once() -> None:
    tokens = [(i * i) % 23 for i in range(1500)]
    slowly = LookUp()
    for end in (1, 2, 40, 511, 512, 513, 1400):
        slowly.guess(tokens[:end], 3)
    assert slowly.guess(tokens, 9) == LookUp().guess(tokens, 9) != ()


def test_the_chance_follows_the_guesses_that_were_right() -> None:
    """0.15 of the way to 1 with a right guess, and to 0 with a wrong one, behind which none
    counts."""
    lookup = LookUp()
    tokens = [1, 2, 3, 4, 5, 1, 2, 3]
    assert lookup.guess(tokens, 3) == (4, 5, 1)
    assert lookup.chance == 0.5
    lookup.guess([*tokens, 4], 3)
    assert lookup.chance == pytest.approx(0.575)
    lookup.guess([*tokens, 4, 9, 1], 3)  # 5 was guessed
    assert lookup.chance == pytest.approx(0.575 * 0.85)


def test_a_prediction_counts_as_if_it_stood_before_the_prompt() -> None:
    """The prompt 1 2 3 and the answer 40: so far the prediction 40 41 42 43 came true. Then 9
    comes in place of 42, and where the answer returns to it, it is guessed again."""
    request = Request(
        id="A",
        prompt_ids=(1, 2, 3),
        sampling=SamplingParams(),
        max_tokens=9,
        eos_ids=frozenset(),
        prediction_ids=(40, 41, 42, 43, 44, 45, 46),
    )
    lookup = LookUp.of(request)
    assert lookup.guess([1, 2, 3, 40], 3) == (41, 42, 43)
    assert lookup.guess([1, 2, 3, 40, 41, 9], 3) == ()
    assert lookup.guess([1, 2, 3, 40, 41, 9, 43, 44, 45], 1) == (46,)
    assert lookup.chance == pytest.approx((0.5 + 0.15 * 0.5) * 0.85)
    assert LookUp.of(replace(request, prediction_ids=())).guess([1, 2, 3, 40], 3) == ()
