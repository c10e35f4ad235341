"""Costs of a step: the time that it takes follows from its content, and is learnt from others.

A step's time is taken for a sum of four terms,

    fixed + a * tokens + b * context + c * pairs

where `tokens` are those of the step with its padding, `context` is the number of positions that its
chunks of one token see, all together, and `pairs` is the same for the tokens of longer chunks. The
last two differ because a chunk reads each page once for many of its tokens.

The four costs are learnt by a Kalman filter: each measured step moves them the more, the less was
known of what is new in it. Steps of answers alone say nothing of the cost of pairs, so that stays
as it is, and less sure, until a long prompt comes. Steps with longer chunks teach the costs of
tokens and pairs only: what a step of answers alone takes, such steps show better. A step that took
longer than expected may have been held up by something else, so that of two in a row the less late
one is believed.
"""

from collections.abc import Iterable
from typing import NamedTuple

_NOISE = 0.1  # of a step's time, the part by which steps of the same content differ
_ALL_DRIFT = 0.02  # of a cost, by which all may change together from one step to the next,
_OWN_DRIFT = 0.003  # and each by itself
_DOUBT = 5  # of a cost, the standard deviation of one of which nothing was heard for long
_OF_CHUNKS = ("token", "pair")  # costs that steps with longer chunks teach
# Before anything is known, a token is taken to cost as much as so many positions.
_CONTEXT_OF_TOKEN, _PAIRS_OF_TOKEN = 300, 3000


class StepSize(NamedTuple):
    """The content of a step, as far as its time depends on it."""

    tokens: int = 0
    context: int = 0  # positions that chunks of one token see
    pairs: int = 0  # positions that the tokens of longer chunks see

    def plus(self, chunks: Iterable[tuple[int, int]], window: int | None) -> "StepSize":
        """Returns the size with more chunks, each the position of its first token and its length.

        The token at position p sees p + 1 positions, or `window` of them.
        """
        tokens, context, pairs = self
        for start, length in chunks:
            tokens += length
            whole = length if window is None else min(length, max(0, window - start))
            seen = whole * start + whole * (whole + 1) // 2 + (length - whole) * (window or 0)
            if length == 1:
                context += seen
            else:
                pairs += seen
        return StepSize(tokens, context, pairs)

    def union(self, other: "StepSize") -> "StepSize":
        """Returns the size of the slower of two parts that are computed side by side."""
        return StepSize(*map(max, self, other))


class StepCosts(NamedTuple):
    """Seconds that a step takes for each of its parts."""

    fixed: float
    token: float
    context: float
    pair: float

    def seconds(self, size: StepSize) -> float:
        """Returns the estimated seconds of a step."""
        tokens, context, pairs = size
        return self.fixed + self.token * tokens + self.context * context + self.pair * pairs


class LearntCosts:
    """The costs of an engine's steps, from their measured times.

    Attributes:
        costs: None before the first step.
    """

    def __init__(self) -> None:
        self.costs: StepCosts | None = None
        self._least: tuple[float, ...] = ()  # what a cost is taken for where its doubt is measured
        self._covariance: list[list[float]] = []
        # Seconds of the last step without longer chunks, and with such, over those expected.
        self._ratios = [1.0, 1.0]

    def learn(self, size: StepSize, seconds: float) -> None:
        """Takes in a step of this size, padding included, that took so long."""
        if self.costs is None:
            self._begin(size, seconds)
            return
        costs, terms = self.costs, (1, *size)
        expected = costs.seconds(size)
        has_chunks = size.pairs > 0
        ratio = seconds / expected
        seconds = expected * min(ratio, max(1.0, self._ratios[has_chunks]))
        self._ratios[has_chunks] = ratio
        covariance = self._doubted(costs)
        moved = [sum(map(_product, row, terms)) for row in covariance]
        variance = sum(map(_product, moved, terms)) + (_NOISE * seconds) ** 2
        surprise = (seconds - expected) / variance
        taught = [not has_chunks or name in _OF_CHUNKS for name in StepCosts._fields]
        self.costs = StepCosts(
            *(
                max(0.0, cost + move * surprise) if is_taught else cost
                for cost, move, is_taught in zip(costs, moved, taught, strict=True)
            )
        )
        for i, move in enumerate(moved):
            for j, other in enumerate(moved):
                if taught[i] or taught[j]:
                    covariance[i][j] -= move * other / variance
        self._covariance = covariance

    def _begin(self, size: StepSize, seconds: float) -> None:
        """Takes half of the first step for what its tokens cost."""
        token = seconds / 2 / max(1, size.tokens)
        self.costs = StepCosts(
            seconds / 2, token, token / _CONTEXT_OF_TOKEN, token / _PAIRS_OF_TOKEN
        )
        self._least = tuple(cost / 10 for cost in self.costs)
        self._covariance = [
            [(_DOUBT * cost) ** 2 if i == j else 0.0 for j in range(len(self.costs))]
            for i, cost in enumerate(self.costs)
        ]

    def _doubted(self, costs: StepCosts) -> list[list[float]]:
        """Returns the covariance of the costs when the next step is measured."""
        scales = [*map(max, costs, self._least)]
        covariance = [
            [
                value + _ALL_DRIFT**2 * scale * other
                for value, other in zip(row, scales, strict=True)
            ]
            for row, scale in zip(self._covariance, scales, strict=True)
        ]
        for i, scale in enumerate(scales):
            covariance[i][i] += (_OWN_DRIFT * scale) ** 2
            excess = covariance[i][i] / (_DOUBT * scale) ** 2
            if excess > 1:  # its row and its column shrink alike, so it remains a covariance
                shrink = excess**-0.5
                for j in range(len(scales)):
                    covariance[i][j] *= shrink
                    covariance[j][i] *= shrink
        return covariance


def _product(a: float, b: float) -> float:
    return a * b
