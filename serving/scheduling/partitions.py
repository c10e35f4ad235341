"""Schedulers of the partitions that a mesh splits the sequences into; usually there is one.

A request goes to the partition with the fewest sequences and stays there, with all its choices,
because their pages are there. Each partition has its own rows, pages, prefixes and queue, whose
sizes are those of `limits`.
"""

from collections.abc import Iterable, Sequence

from serving.scheduling.request import Drawn, Event, Request
from serving.scheduling.scheduler import Scheduler
from serving.scheduling.step_plan import Limits, StepPlan


class Partitions:
    """Does what a Scheduler does, with a plan for each partition. Not thread-safe.

    Args:
        limits: of one partition.
        count: number of partitions.
    """

    def __init__(self, limits: Limits, count: int = 1) -> None:
        self.limits = limits
        self._schedulers = [Scheduler(limits) for _ in range(count)]

    def add(self, request: Request) -> None:
        """Queues a request where the fewest sequences are; errors as of `Scheduler.add`."""
        min(
            self._schedulers, key=lambda scheduler: scheduler.num_running + scheduler.num_waiting
        ).add(request)

    def has_room(self, n: int, caller: str) -> bool:
        """Returns True if a partition would queue n choices; see `Scheduler.has_room`."""
        return any(scheduler.has_room(n, caller) for scheduler in self._schedulers)

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Forgets a request, or one choice of it; see `Scheduler.cancel`."""
        for scheduler in self._schedulers:
            scheduler.cancel(request_id, choice)

    def expire(self, now: float) -> list[Event]:
        """Ends every request whose deadline is before `now`; see `Scheduler.expire`."""
        return [event for scheduler in self._schedulers for event in scheduler.expire(now)]

    def plan(self) -> tuple[StepPlan, ...]:
        """Plans the next step of every partition; some of the plans may be empty."""
        return tuple(scheduler.plan() for scheduler in self._schedulers)

    def commit(
        self, plans: Iterable[StepPlan], drawn: Iterable[Sequence[Drawn | None]]
    ) -> list[Event]:
        """Records a step of all partitions; see `Scheduler.commit`."""
        events = []
        for scheduler, plan, tokens in zip(self._schedulers, plans, drawn, strict=True):
            if plan.chunks:
                events += scheduler.commit(plan, tokens)
        return events

    @property
    def has_work(self) -> bool:
        """True if any request has not ended, or any plan is open."""
        return any(scheduler.has_work for scheduler in self._schedulers)

    @property
    def num_pages(self) -> int:
        """Number of pages of all partitions."""
        return self.limits.num_pages * len(self._schedulers)

    @property
    def num_running(self) -> int:
        """Number of sequences that have a row."""
        return sum(scheduler.num_running for scheduler in self._schedulers)

    @property
    def num_waiting(self) -> int:
        """Number of sequences in the queues."""
        return sum(scheduler.num_waiting for scheduler in self._schedulers)

    @property
    def num_free_pages(self) -> int:
        """Number of pages that no sequence holds, those of the prefix caches among them."""
        return sum(scheduler.num_free_pages for scheduler in self._schedulers)

    @property
    def num_cached_pages(self) -> int:
        """Number of free pages whose content can still be found."""
        return sum(scheduler.num_cached_pages for scheduler in self._schedulers)

    @property
    def preemptions(self) -> int:
        """Number of times that a sequence lost its pages and went back to the queue."""
        return sum(scheduler.preemptions for scheduler in self._schedulers)

    @property
    def prompt_tokens(self) -> int:
        """Number of prompt tokens of the requests that were admitted."""
        return sum(scheduler.prompt_tokens for scheduler in self._schedulers)

    @property
    def prefix_hit_tokens(self) -> int:
        """Number of those prompt tokens that the prefix caches had."""
        return sum(scheduler.prefix_hit_tokens for scheduler in self._schedulers)
