"""A device in plain Python that notices every wrong page, and requests for it.

Page size 4 and, where a test says nothing else, 8 pages, 2 rows and 8 tokens a step.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from mixtral_jax.sampling_params import SamplingParams
from serving.scheduling.request import Drawn, Event, FinishReason, Priority, Request
from serving.scheduling.scheduler import Scheduler
from serving.scheduling.step_plan import Chunk, Limits, StepPlan

EOS = 99


def limits(**changes: Any) -> Limits:
    values: dict[str, Any] = dict(
        num_pages=8,
        page_size=4,
        max_sequences=2,
        max_step_tokens=8,
        max_context=32,
        max_waiting=3,
    )
    return Limits(**{**values, **changes})


def request(name: str, prompt: int | Sequence[int], max_tokens: int, **changes: Any) -> Request:
    """A prompt of so many tokens, unlike those of other names, or of these tokens."""
    if isinstance(prompt, int):
        prompt = [1000 * sum(name.encode()) + i for i in range(prompt)]
    values: dict[str, Any] = dict(sampling=SamplingParams(seed=0), eos_ids=frozenset({EOS}))
    return Request(
        id=name, prompt_ids=tuple(prompt), max_tokens=max_tokens, **{**values, **changes}
    )


def scheduler_of(*requests: Request, **changes: Any) -> Scheduler:
    scheduler = Scheduler(limits(**changes))
    for one in requests:
        scheduler.add(one)
    return scheduler


def shape(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    return [(c.request_id, c.start, len(c.token_ids), c.samples) for c in plan.chunks]


def commit(
    scheduler: Scheduler, plan: StepPlan, tokens: Iterable[int | None] | int = 50
) -> list[Event]:
    """Commits with these tokens, or always the same one."""
    if isinstance(tokens, int):
        tokens = [tokens] * len(plan.chunks)
    drawn: list[Drawn | None] = []
    for chunk, token in zip(plan.chunks, tokens, strict=True):
        assert token is not None or not chunk.samples
        drawn.append(Drawn(token_id=token or 0) if chunk.samples else None)
    events = scheduler.commit(plan, drawn)
    check_counts(scheduler)
    return events


def check_counts(scheduler: Scheduler) -> None:
    """Counts the rows of each caller, and those of BATCH, and compares what the scheduler knows."""
    rows = scheduler._rows
    held = Counter(sequence.turn.caller for sequence in rows.running)
    for sequence in scheduler._sequences():
        assert sequence.turn.rows == held[sequence.turn.caller], sequence.turn
    batch = [s for s in rows.running if s.request.priority is Priority.BATCH]
    assert rows._num_batch == len(batch)


def step(scheduler: Scheduler, tokens: Iterable[int] | int = 50) -> StepPlan:
    plan = scheduler.plan()
    commit(scheduler, plan, tokens)
    return plan


def with_rows(scheduler: Scheduler) -> list[str]:
    """Returns the ids of the requests of which something has a row, in alphabetical order."""
    return sorted({sequence.request.id for sequence in scheduler._rows.running})


def told(events: list[Event]) -> list[tuple[str, int, int | None, FinishReason | None]]:
    return [
        (e.request_id, e.choice, e.drawn.token_id if e.drawn else None, e.finish_reason)
        for e in events
    ]


VOCABULARY = 7
END = 0


def draw(history: tuple[int, ...], seed: int, forbidden: frozenset[int]) -> int:
    """The model: any function of all tokens and the seed."""
    token = hash((history, seed)) % VOCABULARY
    while token in forbidden:
        token = (token + 1) % VOCABULARY
    return token


# Tokens that a grammar forces, by request, choice and position.
Forced = Mapping[tuple[str, int, int], int]
NONE: Forced = MappingProxyType({})


def plain_loop(request: Request, choice: int, room: int, forced: Forced = NONE) -> tuple[int, ...]:
    """Prompt and answer as they must be, whatever the scheduler does."""
    tokens = request.prompt_ids
    assert request.sampling.seed is not None
    for number in range(1, min(request.max_tokens, room - len(tokens)) + 1):
        forbidden = request.eos_ids if number <= request.min_tokens else frozenset[int]()
        token = draw(tokens, request.sampling.seed + choice, forbidden)
        tokens = (*tokens, forced.get((request.id, choice, len(tokens)), token))
        if tokens[-1] in request.eos_ids:
            break
    return tokens


class Device:
    """Runs plans on pages of which each place remembers which tokens it is made of.

    Keys and values at a position follow from all tokens up to there: that row of tokens stands for
    them. Within a step all copies are made, then all is written, and then read.
    """

    def __init__(self, limits: Limits, requests: Sequence[Request], forced: Forced = NONE) -> None:
        self.limits = limits
        self.forced = forced
        self.salts = {request.id: request.salt for request in requests}
        self.pages: list[list[object]] = [
            [None] * limits.page_size for _ in range(limits.num_pages)
        ]
        self.ends = {request.id: request.eos_ids for request in requests}
        self.plans: list[StepPlan] = []
        self.drawn: list[int | None] = []  # by the last plan
        self.full = {
            (request.id, choice): plain_loop(request, choice, limits.room, forced)
            for request in requests
            for choice in range(request.n)
        }

    def lose(self) -> None:
        """Loses what stands in the pages."""
        self.pages = [[None] * self.limits.page_size for _ in self.pages]

    def run(self, plan: StepPlan) -> list[int | None]:
        sources, destinations = {s for s, _ in plan.copies}, [d for _, d in plan.copies]
        assert len({*destinations}) == len(destinations)
        assert sources.isdisjoint(destinations)
        for source, destination in plan.copies:
            self.pages[destination] = list(self.pages[source])
        written: set[tuple[int, int]] = set()
        for chunk in plan.chunks:
            full = self.full[chunk.request_id, chunk.choice]
            # A token behind the last may be computed, but only where the end was not foreseen.
            stale = chunk.end >= len(full)
            if stale:
                assert chunk.end == len(full) and chunk.follows is not None
                assert full[-1] in self.ends[chunk.request_id]
            for position in range(chunk.start, chunk.end):
                place = self._place(chunk, position)
                assert place not in written
                written.add(place)
                self.pages[place[0]][place[1]] = (
                    "stale" if stale else self._content(chunk, position)
                )
        drawn = [self._compute(chunk) for chunk in plan.chunks]
        self.drawn = drawn
        self.plans.append(plan)
        return drawn

    def forced_after(self, plan: StepPlan) -> dict[int, list[int]]:
        """Returns the tokens that must come next in rows of a plan, by chunk."""
        runs: dict[int, list[int]] = {}
        for i, chunk in enumerate(plan.chunks):
            position = chunk.end
            while chunk.samples:
                token = self.forced.get((chunk.request_id, chunk.choice, position))
                if token is None:
                    break
                runs.setdefault(i, []).append(token)
                position += 1
        return runs

    def _content(self, chunk: Chunk, position: int) -> object:
        full = self.full[chunk.request_id, chunk.choice]
        return self.salts[chunk.request_id], full[: position + 1]

    def _place(self, chunk: Chunk, position: int) -> tuple[int, int]:
        page, place = divmod(position, self.limits.page_size)
        return chunk.pages[page], place

    def _compute(self, chunk: Chunk) -> int | None:
        full = self.full[chunk.request_id, chunk.choice]
        tokens = chunk.token_ids
        if chunk.follows is not None:
            place = chunk.request_id, chunk.choice, chunk.start
            assert place not in self.forced, "it was known already"
            assert tokens == (0,)
            followed = self.drawn[chunk.follows]
            assert followed is not None
            tokens = (followed,)
        assert tokens == full[chunk.start : chunk.end]
        assert len(chunk.pages) == -(-chunk.end // self.limits.page_size)
        if chunk.end < len(full):
            for position in range(self.limits.visible(chunk.start), chunk.end):
                page, place = self._place(chunk, position)
                assert self.pages[page][place] == self._content(chunk, position)
        if not chunk.samples:
            return None
        if chunk.sampling.repetition_penalty != 1:
            assert chunk.history == full[: chunk.end - 1]
        return draw(full[: chunk.end], chunk.seed, chunk.forbidden)


def drive(
    scheduler: Scheduler,
    device: Device,
    goes_on: Callable[[], bool],
    between: Callable[[], None] = lambda: None,
    trouble: Callable[[], str | None] = lambda: None,
    without: Callable[[], Collection[str]] = tuple,
) -> list[Event]:
    """Steps until there is no work. Where `goes_on`, the next plan is made before the commit.

    Args:
        scheduler: plans.
        device: computes.
        goes_on: says whether the next plan is made before the commit of this one.
        between: is called between two calls of the scheduler.
        trouble: returns "unstarted" for a step that does not start, "lost" for one that loses the
            device's pages, or None.
        without: returns the ids of requests that sit a step out.
    """
    events: list[Event] = []
    pending: tuple[StepPlan, list[int | None]] | None = None

    def record() -> None:
        nonlocal pending
        if pending is not None:
            plan, tokens = pending
            pending = None
            drawn = [None if token is None else Drawn(token_id=token) for token in tokens]
            events.extend(scheduler.commit(plan, drawn))
            between()

    for now in range(3000):
        events += scheduler.expire(now)
        plan = scheduler.plan(without())
        drawn: list[int | None] = []
        match trouble() if plan.chunks else None:
            case "unstarted":
                if goes_on():
                    record()
                scheduler.withdraw(plan)
                plan = StepPlan(chunks=())
            case "lost":
                scheduler.requeue_all()
                device.lose()
                pending, plan = None, StepPlan(chunks=())
            case _ if plan.chunks:
                drawn = device.run(plan)
        between()
        record()
        if plan.chunks:
            for i, run in device.forced_after(plan).items():
                events += scheduler.force(i, run)
        pending = (plan, drawn) if plan.chunks else None
        if pending is not None and not goes_on():
            record()
        if not scheduler.has_work:
            return events
    raise AssertionError("it never ends")
