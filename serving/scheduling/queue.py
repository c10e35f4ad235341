"""Queue: the sequences that wait, by class and caller, and the turns that callers take.

Callers take turns by the tokens that were computed for them, prompts and answers alike: a row or
pages that become free go to the waiting caller with the fewest (deficit round robin over tokens
with a quantum of one token, which is the virtual token counter of Sheng et al., "Fairness in
Serving Large Language Models", OSDI 2024). What a caller's running sequences are about to compute
counts as if it was computed, so that one with long answers does not take every row before the first
token of them is counted. Within a caller and a class the first to come is the first served.

A caller that waits for nothing collects no claim for later: when it comes back it is at most
`CREDIT` tokens below the others. A caller that used an idle server owes nothing for it either: as
soon as nobody waits, all debts end.

Classes: every INTERACTIVE request goes before every BATCH request, but of `BATCH_TURN` rows that
are given out while both wait one goes to BATCH, so that it never waits for ever.

Worked example, nothing reserved: A was served 500 tokens, B 450 and C, which waited for nothing so
far, 0. C comes: it is lifted to min(500, 450) - CREDIT if that is above 0, and goes first.
"""

from bisect import insort
from collections.abc import Iterable, Iterator

from serving.errors import Overloaded
from serving.scheduling.request import Priority
from serving.scheduling.sequence import SequenceState, Turn

CREDIT = 512  # tokens
BATCH_TURN = 32  # rows
# Above this number of callers, those that neither wait nor run are forgotten at the next chance.
_MAX_CALLERS = 1000


class TurnQueue:
    """Sequences that wait for a row, in the order in which they get it.

    Args:
        max_waiting: number of choices that a caller may have in the queue when no other waits; when
            others wait too, each has the same share of it.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._turns: dict[str, Turn] = {}
        # Only lines with someone in them, each from the oldest to the youngest.
        self._lines: dict[tuple[Priority, str], list[SequenceState]] = {}
        self.changes = 0  # number of times that a sequence came or went
        self._size = 0
        self._passed = 0  # rows that INTERACTIVE requests got while BATCH ones waited

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[SequenceState]:
        return (sequence for line in self._lines.values() for sequence in line)

    def turn(self, caller: str) -> Turn:
        """Returns the caller's place in the turns."""
        turn = self._turns.get(caller)
        if turn is None:
            self._forget()
            turn = self._turns[caller] = Turn(caller)
        return turn

    def check_room(self, caller: str, choices: int, owed: int = 0) -> None:
        """Raises Overloaded if a request of so many choices finds no room.

        `owed` is the number of the caller's choices that wait for the first token of another one. A
        request of more choices than the caller's whole share has room if none of them waits.
        """
        turn = self._turns.get(caller)
        waiting = (turn.waiting if turn is not None else 0) + owed
        # A copy, because the callers' thread asks too.
        callers = {name for _, name in tuple(self._lines)} | {caller}
        share = self._max_waiting // len(callers)
        if self._max_waiting:
            share = max(1, share)
        if waiting + max(1, min(choices, share)) > share:
            raise Overloaded(
                f"{waiting} requests are waiting already, each choice counted, and {share} may; "
                "try again shortly"
            )

    def push(self, sequence: SequenceState) -> None:
        """Puts a sequence into its caller's line, by its age."""
        turn = sequence.turn
        if not turn.waiting:
            turn.served = max(turn.served, self._level() - CREDIT)
        line = self._lines.setdefault(_line_of(sequence), [])
        insort(line, sequence, key=lambda other: other.age)
        turn.waiting += len(sequence.choices)
        self._size += 1
        self.changes += 1

    def remove(self, sequence: SequenceState) -> None:
        """Takes a sequence out, wherever it stands."""
        key = _line_of(sequence)
        line = self._lines[key]
        line.remove(sequence)
        if not line:
            del self._lines[key]
        sequence.turn.waiting -= len(sequence.choices)
        self._size -= 1
        self.changes += 1

    def seat(self, sequence: SequenceState) -> None:
        """Takes a sequence out because it got a row."""
        self.remove(sequence)
        is_batch = sequence.request.priority is Priority.BATCH
        sequence.is_due = is_batch and self._batch_is_due
        if is_batch:
            self._passed = 0
        elif any(priority is Priority.BATCH for priority, _ in self._lines):
            self._passed += 1

    def has_waiting(self, priority: Priority) -> bool:
        """Returns True if a sequence of this class or one before it waits."""
        return any(other <= priority for other, _ in self._lines)

    def sole_head(self) -> SequenceState | None:
        """Returns the first in the queue if all that wait are of one caller and class."""
        if len(self._lines) != 1:
            return None
        (line,) = self._lines.values()
        return line[0]

    def heads(self, running: Iterable[SequenceState]) -> list[SequenceState]:
        """Returns the first of each line, in the order in which rows go to them.

        `running` are the sequences that have a row; what they are about to compute is reserved.
        """
        for turn in self._turns.values():
            turn.reserved = 0
        for sequence in running:
            sequence.turn.reserved += sequence.reserve
        first = Priority.BATCH if self._batch_is_due else Priority.INTERACTIVE
        return sorted(
            (line[0] for line in self._lines.values()),
            key=lambda head: (head.request.priority is not first, head.turn.level, head.age),
        )

    @property
    def _batch_is_due(self) -> bool:
        return self._passed >= BATCH_TURN - 1

    def _level(self) -> int:
        """Number of tokens from which a caller that begins to wait is counted."""
        waiting = [self._turns[caller].served for _, caller in self._lines]
        if waiting:
            return min(waiting)
        return max(turn.served for turn in self._turns.values())

    def _forget(self) -> None:
        """Drops callers that neither wait nor run, when there are very many."""
        if len(self._turns) < _MAX_CALLERS:
            return
        self._turns = {
            caller: turn for caller, turn in self._turns.items() if turn.waiting or turn.rows
        }


def _line_of(sequence: SequenceState) -> tuple[Priority, str]:
    return sequence.request.priority, sequence.request.caller
