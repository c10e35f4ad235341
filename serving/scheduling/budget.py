"""Budget: which tokens of prompts a step computes, of those that are not past their prompts.

Callers share a step's tokens evenly; what one does not need the others get. Of a caller's share at
least half goes to its oldest prompt, and with what remains its shortest prompts are ended first: a
short prompt does not wait for a long one, and every prompt gets its half once the older ones end.
Prompts of BATCH requests get what INTERACTIVE ones do not need, and at least a small share.

Worked example: a budget of 8; A has prompts of 20 and 3 tokens to compute, B one of 2. B gets its
2, A the other 6: half of them for its oldest, and the other 3 end its short one.
"""

from collections.abc import Sequence

from serving.scheduling.request import Priority
from serving.scheduling.sequence import SequenceState, Turn

BATCH_SHARE = 32  # of so many tokens of prompts, at least one is of a BATCH request's


def prompt_sizes(prompts: Sequence[SequenceState], budget: int) -> list[tuple[SequenceState, int]]:
    """Returns how many tokens of each prompt to compute, more than 0, in order of importance.

    Args:
        prompts: sequences that lack more than one token, from the oldest to the youngest.
        budget: number of tokens for all of them.
    """
    urgent = [s for s in prompts if s.request.priority is Priority.INTERACTIVE]
    if not urgent or len(urgent) == len(prompts):
        return _sizes_by_caller(prompts, budget)
    batch = [s for s in prompts if s.request.priority is not Priority.INTERACTIVE]
    needed = sum(sequence.remaining for sequence in urgent)
    others = max(budget - needed, budget // BATCH_SHARE, 1)
    return _sizes_by_caller(urgent, budget - others) + _sizes_by_caller(batch, others)


def _sizes_by_caller(
    prompts: Sequence[SequenceState], budget: int
) -> list[tuple[SequenceState, int]]:
    by_caller: dict[Turn, list[SequenceState]] = {}
    for sequence in prompts:
        by_caller.setdefault(sequence.turn, []).append(sequence)
    if len(by_caller) == 1:
        return _sizes_of_caller(prompts, budget)
    sizes: list[tuple[SequenceState, int]] = []
    needs = {turn: sum(s.remaining for s in own) for turn, own in by_caller.items()}
    # The smallest need comes first, so that what it leaves is shared by the others. Of equal needs
    # the caller that was served fewer tokens comes last and gets what does not divide.
    order = sorted(needs, key=lambda turn: (needs[turn], -turn.served))
    for number, turn in enumerate(order):
        share = min(needs[turn], budget // (len(order) - number))
        budget -= share
        sizes += _sizes_of_caller(by_caller[turn], share)
    return sizes


def _sizes_of_caller(
    prompts: Sequence[SequenceState], budget: int
) -> list[tuple[SequenceState, int]]:
    oldest, *others = prompts
    half = min(oldest.remaining, -(-budget // 2))
    rest = budget - half
    sizes: list[tuple[SequenceState, int]] = []
    for sequence in sorted(others, key=lambda other: other.remaining):
        sizes.append((sequence, min(sequence.remaining, rest)))
        rest -= sizes[-1][1]
    sizes.insert(0, (oldest, min(oldest.remaining, half + rest)))
    return [(sequence, size) for sequence, size in sizes if size]
