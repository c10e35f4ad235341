"""Drafts: guesses that a second model makes, of several answers at once.

A drafter is slower than a look at what is known already, so it is asked for as many guesses as will
be checked (worth.py), and for none where these would not pay. It must have computed all tokens of
an answer before it guesses the next one: where it lacks many it computes some in every step, while
the answer goes on without guesses.

An answer whose next tokens are to be guessed waits until its last one is known, as in proposer.py.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from serving.scheduling.guesses.proposer import room
from serving.scheduling.guesses.worth import (
    MOST_GUESSES,
    Guesses,
    Offer,
    RoundTimes,
    StepTimes,
    worth_their_places,
)
from serving.scheduling.sequence import SequenceState


class Drafter(Protocol):
    """Guesses the tokens of answers by a model of its own. Used by one thread."""

    @property
    def num_drafts(self) -> int:
        """Number of times that it has computed something."""

    def chance(self, sequence: SequenceState) -> float:
        """Returns the chance that the next guess is right, from the guesses that it has made."""

    def room(self, sequence: SequenceState) -> int:
        """Returns the number of guesses that its own context has room for."""

    def is_behind(self, sequence: SequenceState) -> bool:
        """Returns True if it lacks more tokens of the sequence than it computes before a guess."""

    def round_times(self) -> RoundTimes | None:
        """Returns its times, or None where they were never measured, or not for many plans."""

    def draft(
        self,
        wanted: Mapping[SequenceState, int],
        behind: Collection[SequenceState],
        *,
        is_alone: bool,
    ) -> Guesses:
        """Returns guesses of the next tokens; at most as many as are wanted, or none.

        Args:
            wanted: numbers of guesses, of sequences whose last token is known.
            behind: sequences of which it computes what it lacks, or a piece of that.
            is_alone: no step is under way, so that the time that this takes is its own.
        """


def propose_drafts(
    drafter: Drafter,
    decodes: Sequence[SequenceState],
    budget: int,
    times: StepTimes,
    *,
    is_alone: bool,
) -> tuple[list[SequenceState], Guesses]:
    """Returns what `proposer.propose` does; `times` have those of `drafter`."""
    spare = budget - len(decodes)
    if spare < 1:
        return [*decodes], {}
    offers = {
        s: Offer(count, drafter.chance(s))
        for s in decodes
        if s.may_be_guessed and (count := min(room(s), drafter.room(s)))
    }
    if not _may_pay(offers, decodes, spare, times):
        return [*decodes], {}
    worth = worth_their_places(offers, decodes, spare, times)
    behind = [s for s in worth if drafter.is_behind(s)]
    waiting = {s for s in worth if s.undrawn}.difference(behind)
    ready = [s for s in decodes if s not in waiting]
    known = {s: offers[s] for s in worth if not s.undrawn and s not in behind}
    wanted = worth_their_places(known, ready, spare, times) if waiting or behind else worth
    if not wanted and not behind:
        return ready, {}
    return ready, drafter.draft(wanted, behind, is_alone=is_alone)


def _may_pay(
    offers: Mapping[SequenceState, Offer],
    decodes: Sequence[SequenceState],
    spare: int,
    times: StepTimes,
) -> bool:
    """Returns False if guesses of the likeliest answer, or of all, seem to raise nothing.

    This takes less time than `worth_their_places`, for every step of a batch that is nearly full.
    """
    alone = times.begin(decodes)
    if not offers or alone is None:
        return bool(offers)
    chance, rows = max(offer.chance for offer in offers.values()), len(decodes)
    for answers in {1, min(len(offers), spare)}:
        for rounds in (1, 2, 4, 8, MOST_GUESSES):
            if answers * rounds > spare:
                break
            right = sum(chance**place for place in range(1, rounds + 1))
            lasting = times.of_rounds(answers, rounds)
            assert lasting is not None, "the time of steps is known"
            if (rows + answers * right) / lasting > rows / alone:
                return True
    return False
