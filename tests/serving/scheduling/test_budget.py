"""How a step's tokens are shared among prompts, worked out by hand."""

import pytest

from serving.scheduling.budget import prompt_sizes
from serving.scheduling.pages import PagePool, PageTable
from serving.scheduling.request import Priority
from serving.scheduling.sequence import SequenceState, Turn
from tests.serving.scheduling.plain_device import request

POOL = PagePool(8, 4)


def prompt(turn: Turn, length: int, priority: Priority = Priority.INTERACTIVE) -> SequenceState:
    asked = request("x", length, 5, caller=turn.caller, priority=priority)
    return SequenceState(
        request=asked,
        turn=turn,
        choice=0,
        arrival=0,
        seed=0,
        limit=length + 5,
        tokens=[*asked.prompt_ids],
        table=PageTable(POOL),
    )


def sizes(budget: int, *prompts: SequenceState) -> list[int]:
    """Tokens of each prompt; those that get none are not named by the function."""
    shares = prompt_sizes(prompts, budget)
    assert all(size > 0 for _, size in shares)
    by_sequence = dict(shares)
    return [by_sequence.get(sequence, 0) for sequence in prompts]


def test_the_example_of_the_module() -> None:
    a, b = Turn("A", served=12), Turn("B", served=10)
    assert sizes(8, prompt(a, 20), prompt(a, 3), prompt(b, 9)) == [2, 1, 5]


@pytest.mark.parametrize(
    ("budget", "served", "needs", "expected"),
    [
        (8, (0, 0), (20, 20), [4, 4]),
        (9, (1, 1), (20, 20), [5, 4]),
        (8, (0, 0), (20, 3), [5, 3]),  # what one does not need the other gets
        (8, (0, 100), (20, 20), [8, 0]),
        (30, (0, 100), (20, 20), [20, 10]),
        (99, (0, 100), (20, 20), [20, 20]),
        (
            9,
            (5, 0, 5),
            (20, 20, 20),
            [1, 7, 1],
        ),  # all come to 6, and the token that is left goes to the second
        (1, (3, 3, 3), (20, 20, 20), [1, 0, 0]),
    ],
)
def test_callers_come_to_the_same_number_of_tokens(
    budget: int, served: tuple[int, ...], needs: tuple[int, ...], expected: list[int]
) -> None:
    turns = [Turn(str(i), served=number) for i, number in enumerate(served)]
    prompts = [prompt(turn, need) for turn, need in zip(turns, needs, strict=True)]
    assert sizes(budget, *prompts) == expected


def test_of_a_caller_the_oldest_gets_half_and_the_shortest_end_first() -> None:
    turn = Turn("A")
    assert sizes(10, prompt(turn, 20), prompt(turn, 7), prompt(turn, 3)) == [5, 2, 3]
    assert sizes(10, prompt(turn, 4), prompt(turn, 2)) == [4, 2]


def test_batch_gets_what_is_left_and_a_little_always() -> None:
    interactive, batch = Turn("A"), Turn("B")

    def of(budget: int, need: int) -> list[int]:
        return sizes(budget, prompt(batch, 500, Priority.BATCH), prompt(interactive, need))

    assert of(100, 60) == [40, 60]
    assert of(100, 600) == [3, 97]
    assert of(20, 600) == [1, 19]
