"""LookUp: guesses the tokens of an answer from what followed the same tokens before.

Answers repeat their prompts, as summaries, edits and extractions do, and themselves, as lists and
JSON do. Where the last tokens stand in the prompt or the answer already, what followed them there
is likely to follow again. No second model is needed; vLLM calls this "ngram", Hugging Face "prompt
lookup decoding".

The place with the longest match counts, and of several the last one. A text that repeats itself to
its end is continued in circles.

Where the caller says what the answer may repeat (OpenAI's `prediction`), that counts as if it had
stood before the prompt, behind the same tokens that the prompt ends with: so the answer's first
token, too, has a place that it may go on from.

Worked example: after 5 6 7 8 9 5 6 7 the last three tokens stand at the beginning, where 8 9
followed; and then 5 6 7 8 9 and so on.
"""

from collections.abc import Sequence

import numpy as np

from serving.scheduling.guesses.guesser import learnt_chance
from serving.scheduling.request import Request

_SHORTEST, _LONGEST = 3, 8  # tokens of a match
_MOST_PLACES = 64  # the last so many places are compared: a prompt may be one token all along
_FIRST_CHANCE = 0.5
_ROOM = 512  # tokens


class LookUp:
    """Guesses the tokens of one answer, and knows how often it was right.

    Args:
        before: Tokens that count as if they stood before the prompt.

    Attributes:
        chance: The share of right guesses, the newest of which count most; a guess counts that was
            made, not only one that a step checked.
    """

    def __init__(self, before: Sequence[int] = ()) -> None:
        self.chance = _FIRST_CHANCE
        self._known = np.empty(_ROOM + len(before), np.int32)
        self._known[: len(before)] = before
        self._before = self._count = len(before)
        self._guesses: tuple[int, ...] = ()  # of the last call, for the places from _count on

    @classmethod
    def of(cls, request: Request) -> "LookUp":
        """Returns that of an answer to a request; see `Proposer`."""
        prediction = request.prediction_ids
        return cls((*request.prompt_ids[-_LONGEST:], *prediction) if prediction else ())

    def guess(self, tokens: Sequence[int], count: int) -> tuple[int, ...]:
        """Returns up to `count` tokens that may come next; see `Guesser`."""
        self._take(tokens)
        place = self._last_match()
        self._guesses = ()
        if place is not None:
            followed = self._known[place : self._count].tolist()
            circles = -(-count // len(followed))
            self._guesses = tuple((followed * circles)[:count])
        return self._guesses

    def _take(self, tokens: Sequence[int]) -> None:
        """Takes in the tokens that are new, and how many of them were guessed."""
        new = tokens[self._count - self._before :]
        self.chance = learnt_chance(self.chance, self._guesses, new)
        end = self._before + len(tokens)
        if end > len(self._known):
            self._known = np.concatenate([self._known, np.empty(end, np.int32)])
        self._known[self._count : end] = new
        self._count = end

    def _last_match(self) -> int | None:
        """Returns the place behind the longest earlier match of the last tokens."""
        known = self._known[: self._count]
        if len(known) <= _SHORTEST:
            return None
        ends = np.flatnonzero(known[:-1] == known[-1])[-_MOST_PLACES:]
        for back in range(1, _LONGEST):
            deep = ends[ends >= back]
            longer = deep[known[deep - back] == known[-1 - back]]
            if not longer.size:
                return int(ends[-1]) + 1 if back >= _SHORTEST else None
            ends = longer
        return int(ends[-1]) + 1
