"""Schedulers of the partitions that a mesh splits the sequences into; usually there is one.

A request goes to the partition with the fewest sequences and stays there, with all its choices,
because their pages are there. Each partition has its own rows, pages, prefixes and queue, whose
sizes are those of `limits`.

A suspect is a request that may end the engine. In the steps in which something of a suspect is
computed nothing else is, in any partition: if such a step fails, it is known whose fault it is. The
suspects and all the others take turns, a step each.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import reduce

from serving.scheduling.guesses.drafts import Drafter
from serving.scheduling.guesses.guesser import Proposer
from serving.scheduling.request import Event, Request, RowDraws
from serving.scheduling.rhythm import Rhythm
from serving.scheduling.scheduler import Scheduler
from serving.scheduling.step_cost import StepSize
from serving.scheduling.step_plan import Limits, StepPlan


class Partitions:
    """Does what a Scheduler does, with a plan for each partition. Not thread-safe.

    Args:
        limits: of one partition.
        count: number of partitions.
        proposer: makes what guesses the next tokens of answers; None for no guesses.
        rhythm: bounds the prompts beside answers, which wait for them in all partitions; None for
            as many as a step has room for.
        drafter: guesses the next tokens in place of a proposer, where there is one partition.
    """

    def __init__(
        self,
        limits: Limits,
        count: int = 1,
        proposer: Proposer | None = None,
        rhythm: Rhythm | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        assert drafter is None or count == 1, "a drafter has the pages of one partition"
        self.limits = limits
        self._rhythm = rhythm
        self._schedulers = [Scheduler(limits, proposer, rhythm, drafter) for _ in range(count)]
        # Ids of suspects, and None for all other requests; the first has the next step.
        self._turns = deque[str | None]([None])

    def add(self, request: Request) -> None:
        """Queues a request where the fewest sequences are; errors as of `Scheduler.add`."""
        schedulers = sorted(
            self._schedulers, key=lambda scheduler: scheduler.num_running + scheduler.num_waiting
        )
        with_room = (s for s in schedulers if s.has_room(request.n, request.caller))
        next(with_room, schedulers[0]).add(request)
        if request.suspect:
            self.suspect([request.id])

    def has_room(self, n: int, caller: str) -> bool:
        """Returns True if a partition would queue n choices; see `Scheduler.has_room`."""
        return any(scheduler.has_room(n, caller) for scheduler in self._schedulers)

    def uses_slot(self, slot: int) -> bool:
        """Returns True if a request that has not ended has its adapter in this slot."""
        return any(scheduler.uses_slot(slot) for scheduler in self._schedulers)

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Forgets a request, or one choice of it; see `Scheduler.cancel`."""
        for scheduler in self._schedulers:
            scheduler.cancel(request_id, choice)

    def expire(self, now: float) -> list[Event]:
        """Ends every request whose deadline is before `now`; see `Scheduler.expire`."""
        return [event for scheduler in self._schedulers for event in scheduler.expire(now)]

    def plan(self, without: Collection[str] = ()) -> tuple[StepPlan, ...]:
        """Plans the next step of every partition; some of the plans may be empty, or all.

        `without` has the ids of requests that sit the step out; see `Scheduler.plan`.
        """
        if len(self._turns) > 1:  # suspects that have ended are forgotten
            self._turns = deque(turn for turn in self._turns if turn is None or self.has(turn))
        suspects = [turn for turn in self._turns if turn is not None]
        beside = StepSize()
        if self._rhythm is not None:
            self._rhythm.next_step()
            if len(self._schedulers) > 1:
                beside = reduce(StepSize.union, (s.answers() for s in self._schedulers))
        for _ in range(len(self._turns)):
            turn = self._turns[0]
            self._turns.rotate(-1)
            held = without if turn is not None or not suspects else {*suspects, *without}
            plans = tuple(scheduler.plan(held, turn, beside) for scheduler in self._schedulers)
            if any(plan.chunks for plan in plans):
                break
        return plans

    def commit(self, plans: Iterable[StepPlan], drawn: Iterable[Sequence[RowDraws]]) -> list[Event]:
        """Records a step of all partitions; see `Scheduler.commit`."""
        events = []
        for scheduler, plan, tokens in zip(self._schedulers, plans, drawn, strict=True):
            if plan.chunks:
                events += scheduler.commit(plan, tokens)
        return events

    def learn(self, plans: Iterable[StepPlan], seconds: float) -> None:
        """Takes in how long a step of all partitions took."""
        if self._rhythm is not None:
            all_plans = tuple(plans)
            sizes = (plan.size(self.limits.window) for plan in all_plans)
            guesses = max(plan.num_rows - len(plan.chunks) for plan in all_plans)
            self._rhythm.learn(reduce(StepSize.union, sizes), seconds, guesses)

    def force(self, tokens: Mapping[tuple[int, int], Sequence[int]]) -> list[Event]:
        """Records tokens that must come next, by plan and chunk; see `Scheduler.force`."""
        return [
            event
            for (plan, chunk), forced in tokens.items()
            for event in self._schedulers[plan].force(chunk, forced)
        ]

    def withdraw(self, plans: Iterable[StepPlan]) -> None:
        """Undoes the newest plans, whose step did not start; see `Scheduler.withdraw`."""
        for scheduler, plan in zip(self._schedulers, plans, strict=True):
            if plan.chunks:
                scheduler.withdraw(plan)

    def requeue_all(self) -> None:
        """Sends every running sequence back to the queue; see `Scheduler.requeue_all`."""
        for scheduler in self._schedulers:
            scheduler.requeue_all()

    def suspect(self, request_ids: Iterable[str]) -> None:
        """Takes these requests for suspects, until they end or are trusted again."""
        self._turns.extend(name for name in request_ids if name not in self._turns)

    def trust(self, request_ids: Iterable[str]) -> None:
        """Takes these requests for suspects no more."""
        trusted = {*request_ids}
        self._turns = deque(turn for turn in self._turns if turn not in trusted)

    @property
    def suspects(self) -> frozenset[str]:
        """Ids of the requests that are computed alone."""
        return frozenset(turn for turn in self._turns if turn is not None and self.has(turn))

    def has(self, request_id: str) -> bool:
        """Returns True if a request has not ended."""
        return any(scheduler.has(request_id) for scheduler in self._schedulers)

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
    def checks(self) -> int:
        """Number of times that a step checked guesses of an answer."""
        return sum(scheduler.checks for scheduler in self._schedulers)

    @property
    def guesses(self) -> int:
        """Number of guesses that were checked."""
        return sum(scheduler.guesses for scheduler in self._schedulers)

    @property
    def accepted(self) -> int:
        """Number of guesses that were right."""
        return sum(scheduler.accepted for scheduler in self._schedulers)

    @property
    def prompt_tokens(self) -> int:
        """Number of prompt tokens of the requests that were admitted."""
        return sum(scheduler.prompt_tokens for scheduler in self._schedulers)

    @property
    def prefix_hit_tokens(self) -> int:
        """Number of those prompt tokens that the prefix caches had."""
        return sum(scheduler.prefix_hit_tokens for scheduler in self._schedulers)
