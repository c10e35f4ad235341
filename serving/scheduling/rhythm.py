"""Rhythm: how many tokens of prompts ride along with answers, so that these keep their pace.

Prompts in a step make every answer beside them wait. A number of tokens says little about how long:
those at the end of a long prompt look back on all of it and cost many times those at its beginning,
and the same number costs a laptop and an accelerator differently. So the bound is a time. Beside
answers a step takes at most `slowdown` times what it would take with them alone, by the estimate of
`step_cost.py`. With that the prompts have (slowdown - 1) of every `slowdown` parts of the time, and
take slowdown / (slowdown - 1) times as long as without the answers; at 2.3 that is 1.8.

The bound is for long prompts, and for answers that many wait for. Prompts that fit into
`SHORT_STEPS` steps hold answers up that often at most, and are computed as fast as they can be; in
smaller pieces they would wait, and take more of everybody's time in all. And where more requests
wait for their first token than have answers, a step may take as many times longer: to gather rows
first serves all of them sooner.

After `_SHARED_STEPS` steps of both there is one of answers alone, which shows what these cost by
themselves. It delays the prompts a little and costs nothing, because the answers go on in it.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence

from serving.scheduling.guesses.guess_costs import GuessCosts
from serving.scheduling.step_cost import LearntCosts, StepSize

SHORT_STEPS = 2
"""Prompts of at most so many full steps are not held back."""
_SHARED_STEPS = 16


class Rhythm:
    """Bounds the prompts of steps in which answers go on; learns how long steps take.

    Args:
        slowdown: A step with prompts may take so many times as long as one of answers alone.
        sizes: Numbers of tokens that steps are padded to, from small to large; empty: no padding.
        costs: What is known of steps' times.

    Attributes:
        guess_costs: What is known of the times of steps with guesses.
    """

    def __init__(
        self, slowdown: float, sizes: Sequence[int] = (), costs: LearntCosts | None = None
    ) -> None:
        assert slowdown > 1, "prompts would never be computed"
        self._slowdown = slowdown
        self._sizes = tuple(sizes)
        self._costs = costs or LearntCosts()
        self.guess_costs = GuessCosts()
        self._shared_steps = 0  # since the last one of answers alone
        self._is_shared = False

    def next_step(self) -> None:
        """Is called before each step is planned."""
        if self._is_shared and self._shared_steps < _SHARED_STEPS:
            self._shared_steps += 1
        else:
            self._shared_steps = 0
        self._is_shared = False

    def learn(self, size: StepSize, seconds: float, guesses: int = 0) -> None:
        """Takes in how long a step took, in which so many guesses were checked."""
        expected = self.seconds(size)
        if expected is not None:
            self.guess_costs.learn(guesses, seconds / expected)
        if not guesses or expected is None:
            self._costs.learn(self._padded(size), seconds)

    def seconds(self, size: StepSize) -> float | None:
        """Returns the estimated time of a step; None while nothing is known of any."""
        costs = self._costs.costs
        return None if costs is None else costs.seconds(self._padded(size))

    def prompt_tokens(
        self,
        answers: StepSize,
        spare: int,
        with_prompts: Callable[[int], StepSize],
        waiting: float = 1.0,
    ) -> int:
        """Returns how many tokens of prompts the next step computes, of at least one.

        They are none in the rare step that shows how long answers alone take.

        Args:
            answers: What it computes without them, some answer among it.
            spare: The most that there may be.
            with_prompts: Returns the step's size with so many; more tokens, no smaller a size.
            waiting: Number of requests that wait for their first token, for each answer.
        """
        self._is_shared = True
        if self._shared_steps == _SHARED_STEPS:
            return 0
        costs = self._costs.costs
        if costs is None or spare < 1:
            return spare
        limit = max(1.0, waiting) * self._slowdown * costs.seconds(self._padded(answers))

        def lasts_too_long(tokens: int) -> bool:
            return costs.seconds(self._padded(with_prompts(tokens))) > limit

        if not lasts_too_long(spare):
            return spare
        return max(1, bisect_left(range(spare), True, lo=1, key=lasts_too_long) - 1)

    def _padded(self, size: StepSize) -> StepSize:
        if not self._sizes or size.tokens > self._sizes[-1]:
            return size
        return size._replace(tokens=self._sizes[bisect_left(self._sizes, size.tokens)])
