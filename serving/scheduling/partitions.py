"""One scheduler for each part of the sequences, where a mesh splits them; usually there is one.

A request goes to the part with the fewest sequences and stays there, with all its choices: their
pages are there. Each part has its own rows, pages, prefixes and queue, which `limits` says for one.
"""

from collections.abc import Iterable, Sequence

from serving.scheduling.request import Drawn, Event, Request
from serving.scheduling.scheduler import Scheduler
from serving.scheduling.step_plan import Limits, Plan


class Shares:
    """As a Scheduler, but with a plan for each part. Not thread-safe."""

    def __init__(self, limits: Limits, parts: int = 1) -> None:
        self.limits = limits
        self._parts = [Scheduler(limits) for _ in range(parts)]

    def add(self, request: Request) -> None:
        """As `Scheduler.add`."""
        min(self._parts, key=lambda part: part.num_running + part.num_waiting).add(request)

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """As `Scheduler.cancel`."""
        for part in self._parts:
            part.cancel(request_id, choice)

    def expire(self, now: float) -> list[Event]:
        """As `Scheduler.expire`."""
        return [event for part in self._parts for event in part.expire(now)]

    def plan(self) -> tuple[Plan, ...]:
        """As `Scheduler.plan`; some of the plans may be empty."""
        return tuple(part.plan() for part in self._parts)

    def commit(self, plans: Iterable[Plan], drawn: Iterable[Sequence[Drawn | None]]) -> list[Event]:
        """As `Scheduler.commit`."""
        events = []
        for part, plan, tokens in zip(self._parts, plans, drawn, strict=True):
            if plan.chunks:
                events += part.commit(plan, tokens)
        return events

    @property
    def has_work(self) -> bool:
        return any(part.has_work for part in self._parts)

    @property
    def num_pages(self) -> int:
        return self.limits.num_pages * len(self._parts)

    @property
    def num_running(self) -> int:
        return sum(part.num_running for part in self._parts)

    @property
    def num_waiting(self) -> int:
        return sum(part.num_waiting for part in self._parts)

    @property
    def num_free_pages(self) -> int:
        return sum(part.num_free_pages for part in self._parts)

    @property
    def num_cached_pages(self) -> int:
        return sum(part.num_cached_pages for part in self._parts)

    @property
    def preemptions(self) -> int:
        return sum(part.preemptions for part in self._parts)

    @property
    def prompt_tokens(self) -> int:
        return sum(part.prompt_tokens for part in self._parts)

    @property
    def prefix_hit_tokens(self) -> int:
        return sum(part.prefix_hit_tokens for part in self._parts)
