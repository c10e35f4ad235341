"""Preemption: which running sequences give their rows and pages back, for whom.

They go back to the queue with all tokens they have. Their full pages stay in the prefix cache for
as long as nobody needs them, so that they often compute no more than a page again. This costs
nothing while nobody else waits; a row in reserve would cost its share of every step.

A waiting sequence gets the place of a running one in three cases:

1. It is INTERACTIVE and the other is BATCH.
2. Its caller has no row, and the other's caller has the most, at least two, and was served no less
   than `LEAD` tokens fewer: whoever comes gets a row at once, not at the end of an answer.
3. The other's caller was served `LEAD` tokens more, and the other drew `SLICE` tokens since it got
   its row: callers whose answers are long, or whose number is greater than that of rows, go on in
   turns, and each of them comes forward in each turn.

Of a caller the youngest sequence gives way. The oldest of all never does in case 2, nor when the
pages run out, so it always goes on, and all end.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from serving.scheduling.request import Priority
from serving.scheduling.sequence import SequenceState, Turn

LEAD = 96  # tokens


def youngest(running: Sequence[SequenceState]) -> SequenceState:
    """Returns the sequence that gives way when the pages run out.

    It is the youngest of the caller with the most rows, of BATCH requests if there are any.

    Args:
        running: at least one sequence, from the oldest to the youngest.
    """
    batch = [sequence for sequence in running if sequence.request.priority is Priority.BATCH]
    return _youngest_of_largest(batch or running)


def victims(
    head: SequenceState,
    running: Sequence[SequenceState],
    suffices: Callable[[Sequence[SequenceState]], bool],
) -> list[SequenceState]:
    """Returns sequences that give way to a waiting one; none if it has to wait.

    Args:
        head: the waiting sequence.
        running: sequences with rows, from the oldest to the youngest.
        suffices: says whether `head` has a row and pages once these sequences have none.
    """
    chosen: list[SequenceState] = []
    remaining = list(running)
    while remaining:
        sequence = _victim(head, remaining)
        if sequence is None:
            return []
        chosen.append(sequence)
        remaining.remove(sequence)
        if suffices(chosen):
            return chosen
    return []


def _victim(head: SequenceState, running: Sequence[SequenceState]) -> SequenceState | None:
    priority = head.request.priority
    lower = [s for s in running if s.request.priority > priority and not _is_protected(s)]
    if lower:
        return _youngest_of_largest(lower)
    equal = [s for s in running if s.request.priority == priority]
    if not equal:
        return None
    rows = Counter(sequence.turn for sequence in running)
    sequence = _youngest_of_largest(equal)
    turn, own = sequence.turn, head.turn
    if not rows[own] and rows[turn] > 1 and own.level <= turn.level + LEAD:
        return sequence
    behind = [s for s in equal if s.had_slice and s.turn.level >= own.level + LEAD]
    return max(behind, key=lambda s: (s.turn.level, s.age), default=None)


def _is_protected(sequence: SequenceState) -> bool:
    return sequence.is_due and not sequence.had_slice


def _youngest_of_largest(running: Sequence[SequenceState]) -> SequenceState:
    rows: Counter[Turn] = Counter(sequence.turn for sequence in running)
    return max(running, key=lambda sequence: (rows[sequence.turn], sequence.age))
