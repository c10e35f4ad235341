"""Scheduler: chooses the tokens that the next step computes, in plain Python.

It owns the queue, the rows, the pages and the progress of every sequence. A step is three calls:
`plan()` chooses, the engine computes, `commit(plan, drawn)` records and returns events.

    waiting --(a row and pages for all its tokens)--> running --(eos, length)--> gone
       ^---------(an older sequence needs its pages)-----|
    cancel and expire: gone from either state, and its pages are free in the same step

Order. The first to come is the first served: no sequence overtakes another that waits for pages,
and the youngest loses its pages if they run out. It goes back to the queue with all tokens it has,
to compute them again; often it finds most of them in the prefix cache. The largest need of a
sequence fits into the pool (`add` refuses others), so the oldest always goes on, and all end.

A step's tokens. Each sequence past its prompt gets one. At least half of the rest goes to the
oldest prompt that is being computed; with what remains the shortest prompts are ended first. So a
short prompt does not wait for a long one, and every prompt gets its half once the older ones end.

Prefixes and windows. Full pages are registered by their content once they are computed, and found
by later requests (pages.py). Pages before the window, which no later token sees, are given back; a
sequence then needs pages for its window and a chunk, however long it grows.

Choices. The prompt of n choices is computed once, as choice 0. When its first token is known the
others are forked from it: they share the prompt's pages and compute its last token again, each to
draw its own first token. A fork for which there is no row or page waits as any sequence does.

Pipelining. The next plan may be made while one is not committed yet, so that the device never waits
for the host. A token that the open plan draws is written in the next one as 0, and `follows` has
the index of the chunk that draws it. Steps run on the device in the order of their plans.

Worked example: budget 8, page size 4. A has a prompt of 3 tokens and max_tokens 2, B has a prompt
of 10 and max_tokens 1. The first plan takes A's 3 tokens and B's first 5; A draws. The second, made
before the first is committed, takes one token of A at position 3, not known yet (follows=0), and
B's other 5; both draw their last token. B holds 3 pages all along, and A 1.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain
from secrets import randbits

from serving.errors import ContextTooLong, InvalidRequest, Overloaded
from serving.scheduling.pages import PagePool, PageTable
from serving.scheduling.request import Drawn, Event, FinishReason, Request
from serving.scheduling.sequence import SequenceState
from serving.scheduling.step_plan import Limits, StepPlan


class Scheduler:
    """Owns the queue, the pages and every sequence's progress. Not thread-safe."""

    def __init__(self, limits: Limits) -> None:
        assert limits.max_sequences <= limits.max_step_tokens
        self.limits = limits
        self.preemptions = 0  # times that a sequence lost its pages and went back to the queue
        self.prompt_tokens = 0  # of the requests that were admitted
        self.prefix_hit_tokens = 0  # those of them that the prefix cache had
        self._pool = PagePool(limits.num_pages, limits.page_size, limits.prefix_reuse)
        self._waiting: list[SequenceState] = []  # both from the oldest to the youngest
        self._running: list[SequenceState] = []
        self._open = deque[tuple[StepPlan, list[SequenceState]]]()  # plans that are not committed
        self._arrivals = 0
        self._now = 0.0

    @property
    def has_work(self) -> bool:
        """True if any request has not ended, or a plan is open."""
        return bool(self._waiting or self._running or self._open)

    @property
    def num_running(self) -> int:
        """Number of sequences that have a row."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Number of sequences in the queue."""
        return len(self._waiting)

    @property
    def num_free_pages(self) -> int:
        """Number of pages that no sequence holds, those of the prefix cache among them."""
        return self._pool.num_free

    @property
    def num_cached_pages(self) -> int:
        """Number of free pages whose content can still be found."""
        return self._pool.num_cached

    def add(self, request: Request) -> None:
        """Queues a request.

        The prompt must leave room for at least one token; the answer is cut at the context's end.

        Raises:
            InvalidRequest: the prompt is empty.
            ContextTooLong: it can never fit.
            Overloaded: too many requests wait already.
        """
        prompt, room = len(request.prompt_ids), self.limits.room
        if not prompt:
            raise InvalidRequest("the prompt is empty; give at least one token")
        if prompt >= room:
            raise ContextTooLong(
                f"the prompt has {prompt} tokens; this server holds {room} tokens of prompt and "
                "answer together: shorten the messages"
            )
        if len(self._waiting) >= self.limits.max_waiting:
            raise Overloaded(
                f"{len(self._waiting)} requests are waiting already; try again shortly"
            )
        self._arrivals += 1
        seed = request.sampling.seed
        seed = randbits(31) if seed is None else seed
        self._waiting.append(self._sequence(request, 0, self._arrivals, seed))

    def has_room(self, n: int, caller: str) -> bool:
        """Returns True if a request of n choices of this caller would be queued now.

        This is an estimate, for any thread.
        """
        return len(self._waiting) < self.limits.max_waiting

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Forgets a request, or one choice of it that has had a token, and frees its pages.

        Does nothing if that has ended already.
        """
        self._drop(
            [
                sequence
                for sequence in chain(self._running, self._waiting)
                if sequence.request.id == request_id and choice in (None, sequence.choice)
            ]
        )

    def expire(self, now: float) -> list[Event]:
        """Ends every request whose deadline is before `now`, by time.monotonic().

        To be called before `plan`.
        """
        self._now = now
        late = [
            sequence
            for sequence in chain(self._running, self._waiting)
            if sequence.request.deadline is not None and sequence.request.deadline < now
        ]
        self._drop(late)
        return [
            Event(
                request_id=sequence.request.id,
                choice=choice,
                drawn=None,
                finish_reason=FinishReason.DEADLINE,
            )
            for sequence in late
            for choice in sequence.choices
        ]

    def plan(self) -> StepPlan:
        """Plans the next step. At most one earlier plan may be open, that is, not committed.

        The plan is empty if there is no work, or none before the open plan is committed: with a
        plan open no sequence loses its pages, because the device still writes them. An empty plan
        is not committed.
        """
        assert len(self._open) <= 1, "commit the older plan first"
        self._admit()
        draft: dict[SequenceState, int] = {}
        for sequence in [s for s in self._running if s.remaining == 1]:
            self._claim(sequence, 1, draft)
        self._claim_prompts(self.limits.max_step_tokens - len(draft), draft)
        order = sorted(draft, key=lambda sequence: draft[sequence] > 1)
        plan = StepPlan(
            chunks=tuple(sequence.advance(draft[sequence], i) for i, sequence in enumerate(order)),
            copies=tuple(copy for sequence in order if (copy := sequence.table.settle())),
        )
        if plan.chunks:
            self._open.append((plan, order))
        return plan

    def commit(self, plan: StepPlan, drawn: Sequence[Drawn | None]) -> list[Event]:
        """Records the oldest open plan and returns its events.

        `drawn[i]` is read where chunk i samples. Sequences that have ended since `plan`, by cancel
        or by the previous commit, are passed over. Their pages are free already, and this is safe:
        steps run in order, so the writes of a stale chunk come before those of the page's next
        holder. Pages of the prefix cache stay as they are: a page is registered when all its tokens
        are committed, and uncommitted tokens are written behind those.
        """
        expected, sequences = self._open.popleft()
        assert plan is expected, "plans are committed in their order"
        events = []
        for chunk, sequence, token in zip(plan.chunks, sequences, drawn, strict=True):
            if not sequence.running:
                continue
            sequence.steps += 1
            sequence.table.register(sequence.tokens, chunk.end)
            if chunk.samples:
                assert token is not None
                events.append(self._append(sequence, token))
            if sequence.running:
                # A chunk of the next plan, if that is open, starts here: it sees no less.
                sequence.table.slide(self.limits.visible(chunk.end))
        return events

    def _sequence(self, request: Request, choice: int, arrival: int, seed: int) -> SequenceState:
        return SequenceState(
            request=request,
            choice=choice,
            arrival=arrival,
            seed=seed,
            limit=min(len(request.prompt_ids) + request.max_tokens, self.limits.room),
            tokens=list(request.prompt_ids),
            table=PageTable(self._pool),
        )

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.limits.max_sequences:
            if not self._seat(self._waiting[0]):
                return  # in order of arrival: none overtakes a sequence that waits for pages
            sequence = self._waiting.pop(0)
            sequence.running = True
            insort(self._running, sequence, key=lambda other: other.age)

    def _seat(self, sequence: SequenceState) -> bool:
        """Gives a waiting sequence pages for all its tokens, or for its window.

        Returns False, and gives none, if there are too few.
        """
        table = sequence.table
        cached = table.find(sequence.tokens)
        table.slide(self.limits.visible(cached))
        end = len(sequence.tokens)
        if self.limits.window_pages is not None:
            first = self.limits.visible(cached) // self.limits.page_size
            end = min(end, (first + self.limits.window_pages) * self.limits.page_size)
        if not self._spares(table.lacking(end)):
            table.release()
            return False
        table.grow(end)
        sequence.planned = cached
        if not sequence.counted:
            sequence.counted = True
            sequence.seated = self._now
            self.prompt_tokens += len(sequence.tokens)
            self.prefix_hit_tokens += cached
        return True

    def _spares(self, pages: int) -> bool:
        """Returns True if another sequence may have so many pages.

        One page for each running sequence is kept back: otherwise the new one, the youngest, would
        lose all its pages again as soon as one of them comes to the end of a page.
        """
        return pages + len(self._running) <= self._pool.num_free

    def _claim(self, sequence: SequenceState, size: int, draft: dict[SequenceState, int]) -> None:
        """Takes pages for a sequence's next tokens, and drafts as many of these as fit."""
        while sequence.running:
            fitting = min(size, sequence.table.reach - sequence.planned)
            if fitting > 0:
                sequence.table.grow(sequence.planned + fitting)
                draft[sequence] = fitting
                return
            if self._open:
                return
            youngest = self._running[-1]
            draft.pop(youngest, None)
            self._drop([youngest])
            insort(self._waiting, youngest, key=lambda other: other.age)
            self.preemptions += 1

    def _claim_prompts(self, budget: int, draft: dict[SequenceState, int]) -> None:
        prompts = [sequence for sequence in self._running if sequence.remaining > 1]
        if not prompts:
            return
        oldest, *others = prompts
        half = min(oldest.remaining, -(-budget // 2))
        rest = budget - half
        shares: list[tuple[SequenceState, int]] = []
        for sequence in sorted(others, key=lambda other: other.remaining):
            shares.append((sequence, min(sequence.remaining, rest)))
            rest -= shares[-1][1]
        self._claim(oldest, min(oldest.remaining, half + rest), draft)
        for sequence, share in shares:
            if share:
                self._claim(sequence, share, draft)

    def _append(self, sequence: SequenceState, drawn: Drawn) -> Event:
        to_fork = sequence.choices[1:]
        sequence.tokens.append(drawn.token_id)
        sequence.undrawn -= 1
        reason = sequence.finish_reason
        if reason is not None:  # its row is free for a fork, its pages only after that
            self._running.remove(sequence)
            sequence.running = False
        for choice in to_fork:
            self._fork(sequence, choice)
        if reason is not None:
            sequence.table.release()
        return Event(
            request_id=sequence.request.id,
            choice=sequence.choice,
            drawn=drawn,
            finish_reason=reason,
            seated=sequence.seated,
            steps=sequence.steps,
        )

    def _fork(self, first: SequenceState, choice: int) -> None:
        """Starts another choice beside the first one, or queues it by its age."""
        fork = self._sequence(first.request, choice, first.arrival, first.seed)
        fork.counted, fork.seated = True, first.seated
        overtakes = bool(self._waiting) and self._waiting[0].age < fork.age
        free_row = len(self._running) < self.limits.max_sequences
        if not overtakes and free_row and self._spares(1):
            fork.planned = len(fork.tokens) - 1
            fork.table = first.table.fork(fork.planned)
            fork.running = True
            insort(self._running, fork, key=lambda other: other.age)
        else:
            insort(self._waiting, fork, key=lambda other: other.age)

    def _drop(self, sequences: Iterable[SequenceState]) -> None:
        for sequence in sequences:
            (self._running if sequence.running else self._waiting).remove(sequence)
            sequence.running = False
            sequence.table.release()
