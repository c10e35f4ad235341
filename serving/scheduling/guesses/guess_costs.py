"""Costs of guesses: how much longer a step with guesses takes than its size tells.

The costs of a step are taken to grow with its tokens alone (step_cost.py). A mixture of experts
reads other experts for other tokens, so that the second token of a step costs it nearly as much as
the first one, and the hundredth nothing; and chunks of two tokens are not read as long ones are. So
the ratio of both is learnt by itself, of steps with few guesses and with many.

A ratio that nothing is heard of goes back to 1, so that guesses which did not pay are tried again.
"""

_RATE = 0.3  # by which the newest step moves its ratio
_OUTLIER = 2.0  # times its ratio: a step that took longer was held up by something else
_RETURN = 0.01  # with each step without guesses, of the way to 1


class GuessCosts:
    """Ratios of the times of steps with guesses, by the number of these."""

    def __init__(self) -> None:
        self._ratios: dict[int, float] = {}  # by the binary digits of the number

    def ratio(self, guesses: int) -> float:
        """Returns the ratio for so many guesses in a step, which is 1 for none."""
        if not guesses or not self._ratios:
            return 1.0
        digits = guesses.bit_length()
        return self._ratios[min(self._ratios, key=lambda known: abs(known - digits))]

    def learn(self, guesses: int, ratio: float) -> None:
        """Takes in a step: its number of guesses, and its time over that which its size tells."""
        if not guesses:
            for digits in self._ratios:
                self._ratios[digits] += _RETURN * (1.0 - self._ratios[digits])
            return
        before = self.ratio(guesses)
        newest = min(ratio, _OUTLIER * before)
        self._ratios[guesses.bit_length()] = before + _RATE * (newest - before)
