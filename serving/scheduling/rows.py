"""Rows: the sequences that are computed, and how a waiting one comes among them."""

from bisect import insort
from collections.abc import Sequence

from serving.scheduling import preemption
from serving.scheduling.pages import PagePool, PageTable
from serving.scheduling.queue import TurnQueue
from serving.scheduling.request import Priority, Request
from serving.scheduling.sequence import SequenceState
from serving.scheduling.step_plan import Limits

_PATIENCE = 8  # plans after which callers' turns are compared again although nothing else happened


class Rows:
    """Sequences that have a row and pages; takes them from the queue and sends them back.

    Args:
        limits: sizes.
        queue: sequences that wait.
        pool: pages of both.
    """

    def __init__(self, limits: Limits, queue: TurnQueue, pool: PagePool) -> None:
        self.running: list[SequenceState] = []  # from the oldest to the youngest
        self.preemptions = 0  # times that a sequence lost its pages and went back to the queue
        self.prompt_tokens = 0  # of the requests that were admitted
        self.prefix_hit_tokens = 0  # those of them that the prefix cache had
        self._limits = limits
        self._queue = queue
        self._pool = pool
        self._num_batch = 0  # running sequences of BATCH requests
        self._arrivals = 0
        self._plans = 0
        # When nobody could be seated: changes of the queue, rows, pages to spare, and plans.
        self._stuck = (-1, 0, 0, 0)

    def sequence(self, request: Request, choice: int, seed: int) -> SequenceState:
        """Returns a choice of a request that comes now; it neither waits nor runs yet."""
        self._arrivals += 1
        return SequenceState(
            request=request,
            turn=self._queue.turn(request.caller),
            choice=choice,
            arrival=self._arrivals,
            seed=seed,
            limit=min(len(request.prompt_ids) + request.max_tokens, self._limits.room),
            tokens=list(request.prompt_ids),
            table=PageTable(self._pool, request.prefix_salt),
        )

    def num_owed(self, caller: str) -> int:
        """Returns the number of the caller's choices that wait for the first one's first token."""
        return sum(
            len(sequence.choices) - 1
            for sequence in self.running
            if sequence.request.caller == caller
        )

    def admit(self, now: float) -> None:
        """Gives rows and pages to the waiting sequences whose turn it is; `now` is noted."""
        self._plans += 1
        if not self._queue or self._is_stuck:
            return
        while self._queue and self._admit_next(now):
            pass
        self._stuck = (self._queue.changes, len(self.running), self._num_spare, self._plans)

    def fork(self, first: SequenceState, choice: int) -> None:
        """Starts another choice beside the first one, or queues it as if it came now."""
        fork = self.sequence(first.request, choice, first.seed)
        fork.was_seated, fork.seated, fork.cached = True, first.seated, first.cached
        fork.computed, fork.scored = first.computed, first.scored
        overtakes = self._queue.has_waiting(first.request.priority)
        if not overtakes and self._has_row and self._num_spare >= 1:
            fork.planned = len(fork.tokens) - 1
            fork.table = first.table.fork(fork.planned)
            self._enter(fork)
        else:
            self._queue.push(fork)

    def leave(self, sequence: SequenceState) -> None:
        """Takes away a sequence's row; its pages stay with it."""
        self.running.remove(sequence)
        sequence.running = False
        sequence.turn.rows -= 1
        self._num_batch -= sequence.request.priority is Priority.BATCH

    def requeue(self, sequence: SequenceState) -> None:
        """Sends a sequence back to the queue with all tokens that it has.

        It goes on as another state, so that an open plan's chunk of this one is passed over.
        """
        self.leave(sequence)
        sequence.table.release()
        self._queue.push(sequence.restarted(PageTable(self._pool, sequence.request.prefix_salt)))

    def preempt(self, sequence: SequenceState) -> None:
        """Requeues a sequence because another one needs its row or its pages."""
        self.requeue(sequence)
        self.preemptions += 1

    def rewind(self, sequence: SequenceState) -> SequenceState:
        """Returns the state in which a sequence goes on from its last token, which was forced or
        after which nothing was drawn.

        What an open plan computes behind another token is passed over.
        """
        if not sequence.undrawn:
            return sequence
        other = sequence.rewound()
        self.running[self.running.index(sequence)] = other
        sequence.running = False
        return other

    @property
    def _is_stuck(self) -> bool:
        """True if nothing has changed since nobody could be seated, but that callers were served.

        That is looked at again after a few plans, so that a full engine rarely pays for it.
        """
        changes, running, spare, plans = self._stuck
        return (
            changes == self._queue.changes
            and running == len(self.running)
            and spare >= self._num_spare
            and self._plans < plans + _PATIENCE
        )

    @property
    def _has_row(self) -> bool:
        return len(self.running) < self._limits.max_sequences

    @property
    def _num_spare(self) -> int:
        """Number of pages for a sequence that has none yet.

        One page for each running sequence is kept back: otherwise the new one, the youngest, would
        lose all its pages again as soon as one of them comes to the end of a page.
        """
        return self._pool.num_free - len(self.running)

    def _admit_next(self, now: float) -> bool:
        """Seats the first sequence that may have a place; returns False if none may."""
        head = self._queue.sole_head()
        if head is not None and head.turn.rows == len(self.running) and not self._num_batch:
            # All rows are of the only caller that waits: there is nothing to take from others.
            return self._has_row and self._seat(head, now, may_take=False)
        heads = self._queue.heads(self.running)
        most_rows = max((s.turn.rows for s in self.running), default=0)
        leading = max((s.turn.level for s in self.running if s.had_slice), default=0)
        blocked: SequenceState | None = None
        for head in heads:
            if blocked is not None and (
                head.request.priority > blocked.request.priority
                or head.turn.level >= blocked.turn.level + preemption.LEAD
            ):
                return False
            may_take = (
                (not head.turn.rows and most_rows > 1)
                or leading >= head.turn.level + preemption.LEAD
                or (self._num_batch > 0 and head.request.priority is not Priority.BATCH)
            )
            if (self._has_row or may_take) and self._seat(head, now, may_take=may_take):
                return True
            blocked = blocked or head
        return False

    def _seat(self, sequence: SequenceState, now: float, *, may_take: bool) -> bool:
        """Gives a waiting sequence a row, and pages for all its tokens or for its window.

        With `may_take` others may give way for it. Returns False, and gives nothing, if there is
        too little.
        """
        spare = self._num_spare
        if sequence.spare is not None and spare <= sequence.spare and not may_take:
            return False  # no page more than when it was refused
        table, size = sequence.table, self._pool.page_size
        known = sequence.tokens
        if not sequence.is_scored:
            # Each token gives the logprob of the next one, so those from here on are computed.
            known = known[: sequence.scored]
        pages, chains = table.lookup(known)
        cached = len(pages) * size
        first = self._limits.visible(cached) // size
        end = len(sequence.tokens)
        if self._limits.window_pages is not None:
            end = min(end, (first + self._limits.window_pages) * size)
        lacking = max(0, -(-end // size) - len(pages)) + self._pool.num_unheld(pages[first:])
        sequence.spare = spare if lacking > spare else None
        if not self._has_row or lacking > spare:
            if not may_take:
                return False

            def suffices(others: Sequence[SequenceState]) -> bool:
                running = len(self.running) - len(others)
                freed = self._pool.num_freed((other.table for other in others), pages[first:])
                enough = lacking <= self._pool.num_free + freed - running
                return enough and running < self._limits.max_sequences

            giving = preemption.victims(sequence, self.running, suffices)
            if not giving:
                return False
            for other in giving:
                self.preempt(other)
        self._queue.seat(sequence)
        table.start(pages, chains)
        table.slide(self._limits.visible(cached))
        table.grow(end)
        sequence.planned = cached
        if not sequence.was_seated:
            sequence.was_seated, sequence.seated = True, now
            sequence.cached = sequence.computed = cached
            self.prompt_tokens += len(sequence.tokens)
            self.prefix_hit_tokens += cached
        self._enter(sequence)
        return True

    def _enter(self, sequence: SequenceState) -> None:
        sequence.running = True
        sequence.known_at_seat = len(sequence.tokens)
        sequence.turn.rows += 1
        self._num_batch += sequence.request.priority is Priority.BATCH
        insort(self.running, sequence, key=lambda other: other.age)
