"""Recovery: finds the request that makes steps fail, so that it ends and the others go on.

A step that fails names nobody. Those in it that no earlier step has computed are suspects; if there
are none, or nobody else, then all in it are. From then on the scheduler plans in turn a step for
all others, and a step for each suspect, alone. A suspect that fails alone is the culprit. One that
comes to where it was in the failed step is trusted, and goes on with the others.

Worked example: A and B run, C and D have just come. The step [A B C D] fails: C and D are suspects.
The next steps are [A B], [C], [D], [A B] ... If [D] fails, D ends with an error. Once [C] has
computed what it had in the failed step, C is with A and B again.
"""

from collections.abc import Collection, Iterable, Sequence

from serving.scheduling.step_plan import StepPlan

MAX_FAILURES = 8  # in a row, without any step between them that did not fail


class Suspects:
    """Remembers who is suspected, and up to where each must come to be trusted again."""

    def __init__(self) -> None:
        self.num_failures = 0
        """Steps that have failed."""
        self._targets: dict[str, dict[int, int]] = {}  # position of each choice, by request
        self._failures_in_a_row = 0
        self._last_good: Sequence[StepPlan] = ()  # the last step that was not for a suspect

    def __bool__(self) -> bool:
        return bool(self._targets)

    @property
    def is_hopeless(self) -> bool:
        """True if so many steps have failed in a row that no single request is the reason."""
        return self._failures_in_a_row >= MAX_FAILURES

    def forget(self, request_id: str, choice: int | None = None) -> None:
        """Forgets a request that has ended, or one choice of it."""
        target = self._targets.get(request_id, {})
        if choice is not None:
            target.pop(choice, None)
        if choice is None or not target:
            self._targets.pop(request_id, None)

    def keep(self, request_ids: Collection[str]) -> None:
        """Forgets all but these."""
        self._targets = {
            name: target for name, target in self._targets.items() if name in request_ids
        }

    def passed(self, plans: Sequence[StepPlan]) -> Collection[str]:
        """Notes a step that did not fail; returns the suspects that are trusted now."""
        self._failures_in_a_row = 0
        if not self._targets:
            self._last_good = plans
            return ()
        trusted = set[str]()
        is_trial = False
        for plan in plans:
            for chunk in plan.chunks:
                target = self._targets.get(chunk.request_id)
                if target is None:
                    continue
                is_trial = True
                if chunk.end >= target.get(chunk.choice, chunk.end + 1):
                    del target[chunk.choice]
                if not target:
                    trusted.add(chunk.request_id)
        if not is_trial:
            self._last_good = plans
        for request_id in trusted:
            del self._targets[request_id]
        return trusted

    def failed(
        self,
        plans: Sequence[StepPlan],
        alone: Collection[str],
        ended: Collection[tuple[str, int]],
    ) -> tuple[str | None, Iterable[str]]:
        """Notes a step that failed; returns the culprit if it is known, and the new suspects.

        Args:
            plans: Plans of the step.
            alone: Ids of the requests that are computed alone.
            ended: Choices, by request and number, that have ended since the step was planned.
        """
        self.num_failures += 1
        self._failures_in_a_row += 1
        chunks = [chunk for plan in plans for chunk in plan.chunks]
        for chunk in chunks:
            if chunk.request_id in alone:  # and so it was a step for this one
                self._targets.pop(chunk.request_id, None)
                return chunk.request_id, ()
        targets: dict[str, dict[int, int]] = {}
        for chunk in chunks:
            if (chunk.request_id, chunk.choice) not in ended:
                targets.setdefault(chunk.request_id, {})[chunk.choice] = chunk.end
        known = {chunk.request_id for plan in self._last_good for chunk in plan.chunks}
        newest = targets.keys() - known
        if newest:
            targets = {name: target for name, target in targets.items() if name in newest}
        self._targets.update(targets)
        return None, targets.keys()
