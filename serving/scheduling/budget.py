"""Budget: which tokens of prompts a step computes.

The callers that were served the fewest tokens come first, until all are served alike; what is left
then is shared evenly, and what one does not need the others get. Of a caller's share at least half
goes to its oldest prompt, and with what remains its shortest prompts are ended first: a short
prompt does not wait for a long one, and every prompt gets its half once the older ones end. Prompts
of BATCH requests get what INTERACTIVE ones do not need, and at least a small share.

Worked example: a budget of 8; A was served 12 tokens and has prompts of 20 and 3 tokens to compute,
B was served 10 and has one of 9. B gets 5 and A 3, so that both come to 15. Of A's 3 its oldest
prompt gets 2, and the short one 1.
"""

from bisect import bisect_right
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
    if not budget:
        return []
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
    needs = {turn: sum(s.remaining for s in own) for turn, own in by_caller.items()}
    shares = _shares(needs, min(budget, sum(needs.values())))
    return [size for turn, own in by_caller.items() for size in _sizes_of_caller(own, shares[turn])]


def _shares(needs: dict[Turn, int], budget: int) -> dict[Turn, int]:
    """Returns how many of the `budget` tokens each caller gets, all of them together."""

    def shares(level: int) -> dict[Turn, int]:
        """Returns the tokens that bring every caller to `level`, as far as it needs them."""
        return {t: min(need, max(0, level - t.served)) for t, need in needs.items()}

    lowest = min(turn.served for turn in needs)
    levels = range(lowest, max(turn.served + need for turn, need in needs.items()) + 1)
    level = levels[bisect_right(levels, budget, key=lambda n: sum(shares(n).values())) - 1]
    result = shares(level)
    rest = budget - sum(result.values())
    # Tokens that do not divide go to those that were served the fewest, one to each.
    for turn in sorted(needs, key=lambda turn: turn.served):
        if rest and needs[turn] > result[turn] and turn.served <= level:
            result[turn] += 1
            rest -= 1
    return result


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
