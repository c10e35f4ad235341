"""Scheduler: chooses the tokens that the next step computes, in plain Python.

It owns the queue, the rows, the pages and the progress of every sequence. A step is three calls:
`plan()` chooses, the engine computes, `commit(plan, drawn)` records and returns events.

    waiting --(a row and pages for all its tokens)--> running --(eos, length)--> gone
       ^---------(another needs its row or pages)--------|
    cancel and expire: gone from either state, and its pages are free in the same step

Order. Callers take turns (queue.py); of a caller the first to come is the first served. A waiting
sequence can get the place of a running one of another caller (preemption.py), and if the pages run
out as sequences grow, the youngest of the caller with the most rows loses its own. It goes back to
the queue with all its tokens, to compute them again; often it finds most of them in the prefix
cache. The largest need of a sequence fits into the pool (`add` refuses others), so the oldest
always goes on, and all end. While a sequence waits for pages, others of its caller and class wait
behind it; those of other callers pass it until they are `LEAD` tokens ahead.

A step's tokens. Each sequence past its prompt gets one, and those that were forced since, as long
as a step without prompts does not exceed a token for each row; prompts share the rest (budget.py).
So a long prompt makes no answer wait for more than the step in which one chunk of it is computed,
and how large that chunk may be follows from the time that it takes (rhythm.py).

Prefixes and windows. Full pages are found by later requests of the same salt (pages.py). Pages
before the window, which no later token sees, are given back; a sequence then needs pages for its
window and a chunk, however long it grows.

Choices. The prompt of n choices is computed once, as choice 0. When its first token is known the
others are forked from it: they share the prompt's pages and compute its last token again, each to
draw its own first token. Without a row or page, or if anybody waits, a fork goes to the queue.

Pipelining. The next plan may be made while one is not committed yet, so that the device never waits
for the host. A token that the open plan draws is written in the next one as 0, and `follows` has
the index of the chunk that draws it. Steps run on the device in the order of their plans. Whoever
gives way to another caller loses what the open plan draws for it, and draws the same again later.

Forced tokens. Where a grammar lets only certain tokens follow, `force(chunk, tokens)` records them
while the step that would draw the first of them is open. The next plan takes them all at once.

Faults. `withdraw(plan)` undoes a plan whose step did not start. `requeue_all()` is for a device
whose pages are lost. `plan(without=..., only=...)` leaves requests out of a step.

Worked example: budget 8, page size 4. A has a prompt of 3 tokens and max_tokens 2, B has a prompt
of 10 and max_tokens 1. The first plan takes A's 3 tokens and B's first 5; A draws. The second, made
before the first is committed, takes one token of A at position 3, not known yet (follows=0), and
B's other 5; both draw their last token. B holds 3 pages all along, and A 1.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from secrets import randbits

from serving.errors import Overloaded
from serving.scheduling.budget import prompt_sizes
from serving.scheduling.guesses.drafts import Drafter, propose_drafts
from serving.scheduling.guesses.guesser import Proposer
from serving.scheduling.guesses.proposer import propose
from serving.scheduling.guesses.worth import Guesses, StepTimes
from serving.scheduling.pages import PagePool
from serving.scheduling.preemption import youngest
from serving.scheduling.queue import TurnQueue
from serving.scheduling.request import (
    Drawn,
    Event,
    FinishReason,
    Priority,
    Request,
    RowDraws,
    Scored,
    TokenScore,
)
from serving.scheduling.rhythm import SHORT_STEPS, Rhythm
from serving.scheduling.rows import Rows
from serving.scheduling.sequence import SequenceState
from serving.scheduling.step_cost import StepSize
from serving.scheduling.step_plan import Chunk, Limits, StepPlan


class Scheduler:
    """Owns the queue, the pages and every sequence's progress. Not thread-safe."""

    def __init__(
        self,
        limits: Limits,
        proposer: Proposer | None = None,
        rhythm: Rhythm | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        assert limits.max_sequences <= limits.max_step_tokens
        assert proposer is None or drafter is None, "answers are guessed in one way"
        self.limits = limits
        self._proposer = proposer
        self._drafter = drafter
        self._rhythm = rhythm
        self._pool = PagePool(limits.num_pages, limits.page_size, limits.prefix_reuse)
        self._queue = TurnQueue(limits.max_waiting)
        self._rows = Rows(limits, self._queue, self._pool)
        self._open = deque[tuple[StepPlan, list[SequenceState]]]()  # plans that are not committed
        self._now = 0.0
        self._times = StepTimes(
            (lambda size: None) if rhythm is None else rhythm.seconds,
            limits.window,
            None if drafter is None else drafter.round_times,
            None if rhythm is None else rhythm.guess_costs,
        )
        self.checks = 0  # of the guesses of an answer in a step
        self.guesses = 0  # that were checked
        self.accepted = 0  # guesses that were right

    @property
    def has_work(self) -> bool:
        """True if any request has not ended, or a plan is open."""
        return bool(self._queue or self._rows.running or self._open)

    @property
    def num_running(self) -> int:
        """Number of sequences that have a row."""
        return len(self._rows.running)

    @property
    def num_waiting(self) -> int:
        """Number of sequences in the queue."""
        return len(self._queue)

    @property
    def num_free_pages(self) -> int:
        """Number of pages that no sequence holds, those of the prefix cache among them."""
        return self._pool.num_free

    @property
    def num_cached_pages(self) -> int:
        """Number of free pages whose content can still be found."""
        return self._pool.num_cached

    @property
    def preemptions(self) -> int:
        """Number of times that a sequence lost its pages and went back to the queue."""
        return self._rows.preemptions

    @property
    def prompt_tokens(self) -> int:
        """Number of prompt tokens of the requests that were admitted."""
        return self._rows.prompt_tokens

    @property
    def prefix_hit_tokens(self) -> int:
        """Number of those prompt tokens that the prefix cache had."""
        return self._rows.prefix_hit_tokens

    def has(self, request_id: str) -> bool:
        """Returns True if the request has not ended."""
        return any(sequence.request.id == request_id for sequence in self._sequences())

    def uses_slot(self, slot: int) -> bool:
        """Returns True if a request that has not ended has its adapter in this slot."""
        seats = (sequence.request.seat for sequence in self._sequences())
        return any(seat is not None and seat.slot == slot for seat in seats)

    def add(self, request: Request) -> None:
        """Queues a request, or raises and changes nothing.

        The answer is cut at the context's end.

        Raises:
            InvalidRequest: the prompt is empty, or one of its numbers cannot be.
            ContextTooLong: it can never fit.
            Overloaded: too many choices wait already, of all callers or of this one.
        """
        request.check(self.limits.room)
        self._queue.check_room(request.caller, request.n, self._rows.num_owed(request.caller))
        seed = request.sampling.seed
        seed = randbits(31) if seed is None else seed
        self._queue.push(self._rows.sequence(request, 0, seed))

    def has_room(self, n: int, caller: str) -> bool:
        """Returns True if a request of n choices of this caller would be queued now.

        This is an estimate, for any thread.
        """
        try:
            self._queue.check_room(caller, n, self._rows.num_owed(caller))
        except Overloaded:
            return False
        return True

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Forgets a request, or one choice of it that has had a token, and frees its pages.

        Does nothing if that has ended already.
        """
        self._drop(
            [
                sequence
                for sequence in self._sequences()
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
            for sequence in self._sequences()
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

    def answers(self) -> StepSize:
        """Returns the size of a step of answers alone; nothing where nobody waits for them."""
        going = [s for s in self._rows.running if s.remaining and s.answers]
        if not _has_readers(going):
            return StepSize()
        return StepSize().plus(((s.planned, 1) for s in going), self.limits.window)

    def plan(
        self,
        without: Collection[str] = (),
        only: str | None = None,
        beside: StepSize | None = None,
    ) -> StepPlan:
        """Plans the next step. At most one earlier plan may be open, that is, not committed.

        The plan is empty, and not committed, if there is no work, or none before the open plan is
        committed: with a plan open no sequence loses its pages to those that grow.

        Args:
            without: ids of requests of which nothing is computed in this step. They keep their
                places in the queue, their rows and their pages.
            only: id of the one request of which something is computed; None for all.
            beside: the answers of all partitions that have a part in the step, each by itself.
        """
        assert len(self._open) <= 1, "commit the older plan first"
        self._rows.admit(self._now)
        ready = self._rows.running
        if without or only is not None:
            allowed = (s for s in ready if only in (None, s.request.id))
            ready = [s for s in allowed if s.request.id not in without]
        decodes: list[SequenceState] = []
        prompts: list[SequenceState] = []
        for sequence in ready:
            if remaining := sequence.remaining:
                answers = remaining == 1 or sequence.answers
                (decodes if answers else prompts).append(sequence)
        guesses: Guesses = {}
        held: list[SequenceState] = []  # answers that wait for what is guessed of them
        if self._proposer is not None or self._drafter is not None:
            # Prompts come first: a guess may be in vain, and a prompt is not.
            room = self.limits.max_step_tokens - sum(s.remaining for s in prompts)
            rows = self.limits.max_sequences - len(prompts)  # a guess takes one of those that draw
            going = decodes
            decodes, guesses = self._proposed(going, min(room, rows))
            if prompts:  # beside which they go on, though not in this step
                chosen = set(decodes)
                held = [s for s in going if s not in chosen]
                held += [s for s in ready if s.has_open_guesses]
        draft: dict[SequenceState, int] = {}
        # Beside a prompt forced tokens ride along; a step of answers alone they make no larger.
        size = self.limits.max_step_tokens if prompts else self.limits.max_sequences
        extra = max(0, size - len(decodes) - sum(map(len, guesses.values())))
        for sequence in decodes:
            size = 1
            if extra and (forced := min(sequence.remaining - 1, extra)):
                extra -= forced
                size += forced
            if guesses:
                size += len(guesses.get(sequence, ()))
            self._claim(sequence, size, draft)
        if prompts := [sequence for sequence in prompts if sequence.running]:
            answering = draft | {s: 1 for s in held if s.running}
            spare = self.limits.max_step_tokens - sum(draft.values())
            spare = self._prompt_tokens(prompts, answering, spare, beside or StepSize())
            for sequence, size in prompt_sizes(prompts, spare):
                self._claim(sequence, size, draft)
        order = [*draft]
        if sum(draft.values()) > len(draft):
            order.sort(key=lambda sequence: draft[sequence] > 1)
        plan = StepPlan(
            chunks=tuple(
                sequence.advance(draft[sequence], i, guesses.get(sequence, ()))
                for i, sequence in enumerate(order)
            ),
            copies=tuple(copy for sequence in order if (copy := sequence.table.settle())),
        )
        if plan.chunks:
            self._open.append((plan, order))
        return plan

    def commit(self, plan: StepPlan, drawn: Sequence[RowDraws]) -> list[Event]:
        """Records the oldest open plan and returns its events.

        `drawn[i]` is read where chunk i samples; None there means that the row sits this step out:
        its last token is computed again, and what an open plan computes behind it is passed over.
        Where the chunk has guesses, it has the tokens that follow up to the first wrong guess, and
        where it has targets, their scores.
        Sequences that have ended or lost their pages since `plan` are passed over. Their pages are
        free already, and this is safe: steps run in order, so the writes of a stale chunk come
        before those of the page's next holder. Pages of the prefix cache stay as they are: a page
        is registered when all its tokens are committed, and others are written behind those.
        """
        expected, sequences = self._open.popleft()
        assert plan is expected, "plans are committed in their order"
        events: list[Event] = []
        has_window = self.limits.window is not None
        for chunk, sequence, token in zip(plan.chunks, sequences, drawn, strict=True):
            if not sequence.running:
                continue
            sequence.steps += 1
            scores: Sequence[TokenScore] = ()
            if isinstance(token, Scored):
                scores, token = token.scores, token.drawn
                sequence.scored += len(scores)
            # A draw is passed over where its token was forced since the plan.
            end = chunk.end
            is_known = end < len(sequence.tokens)
            sits_out = token is None and chunk.samples and not is_known
            kept = end - chunk.guesses - sits_out  # tokens that are not computed again
            sequence.table.register(sequence.tokens, kept)
            if end < chunk.prompt_length or scores:
                self._tell_progress(sequence, chunk, scores, events)
            if sits_out:
                sequence = self._rows.rewind(sequence)
            elif is_known and chunk.samples:
                pass
            elif isinstance(token, Drawn):
                self._append(sequence, token, events)
            elif token is not None:
                self._accept(sequence, chunk, token, events)
            if has_window and sequence.running:
                # A chunk of the next plan, if that is open, starts here: it sees no less.
                sequence.table.slide(self.limits.visible(kept))
        return events

    def force(self, chunk: int, tokens: Sequence[int]) -> list[Event]:
        """Records tokens that must come next in a row of the newest plan; returns their events.

        What the row draws is passed over. All tokens before must be committed. The next plan
        computes the forced ones together, and draws the token after them.

        Args:
            chunk: index of the row's chunk, which samples and has no guesses.
            tokens: at least one; those behind the one that ends the answer are left out.
        """
        plan, sequences = self._open[-1]
        sequence = sequences[chunk]
        events: list[Event] = []
        if not sequence.running:
            return events
        assert plan.chunks[chunk].end == len(sequence.tokens), "an earlier token is not committed"
        sequence.undrawn += len(tokens) - 1
        for token in tokens:
            self._append(sequence, Drawn(token_id=token, forced=True), events)
            if not sequence.running:
                break
        return events

    def withdraw(self, plan: StepPlan) -> None:
        """Undoes the newest open plan, whose step did not start; the next plan repeats it."""
        newest, sequences = self._open.pop()
        assert plan is newest, "only the newest plan can be withdrawn"
        filled = {destination for _, destination in plan.copies}
        for chunk, sequence in zip(plan.chunks, sequences, strict=True):
            if not sequence.running:
                continue
            if chunk.pages[chunk.start // self.limits.page_size] in filled:
                self._rows.requeue(sequence)  # its first page was never filled
            else:
                sequence.retreat(chunk)

    def requeue_all(self) -> None:
        """Sends every running sequence back to the queue, because the device's pages are lost.

        They are computed again from the tokens that were committed, and go on with the same seeds
        at the same positions. Open plans are dropped: commit none of them. The prefix cache is
        empty.
        """
        self._open.clear()
        for sequence in self._rows.running.copy():
            self._rows.requeue(sequence)
        self._pool.forget()

    def _prompt_tokens(
        self,
        prompts: Sequence[SequenceState],
        answers: Mapping[SequenceState, int],
        spare: int,
        beside: StepSize,
    ) -> int:
        """Returns the number of tokens of prompts that a step has room and time for.

        Args:
            prompts: sequences that lack more than a token.
            answers: tokens of the answers that go on, in this step or in the next.
            spare: tokens that the step has room for.
            beside: see `plan`.
        """
        if self._rhythm is None or not (beside.tokens or _has_readers(answers)):
            return spare
        short = SHORT_STEPS * self.limits.max_step_tokens
        if all(s.known_at_seat - s.cached <= short for s in prompts):
            return spare
        window = self.limits.window
        own = StepSize().plus(((s.planned, size) for s, size in answers.items()), window)

        def with_prompts(tokens: int) -> StepSize:
            sizes = prompt_sizes(prompts, tokens)
            return beside.union(own.plus(((s.planned, size) for s, size in sizes), window))

        waiting = (len(prompts) + len(self._queue)) / max(1, len(answers))
        return self._rhythm.prompt_tokens(beside.union(own), spare, with_prompts, waiting)

    def _proposed(
        self, decodes: Sequence[SequenceState], budget: int
    ) -> tuple[list[SequenceState], Guesses]:
        """Returns what `propose` does."""
        if self._drafter is not None:
            return propose_drafts(
                self._drafter, decodes, budget, self._times, is_alone=not self._open
            )
        assert self._proposer is not None
        return propose(self._proposer, decodes, budget, self._times)

    def _sequences(self) -> Iterable[SequenceState]:
        return chain(self._rows.running, self._queue)

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
            victim = youngest(self._rows.running)
            draft.pop(victim, None)
            self._rows.preempt(victim)

    def _tell_progress(
        self,
        sequence: SequenceState,
        chunk: Chunk,
        scores: Sequence[TokenScore],
        events: list[Event],
    ) -> None:
        """Records what a chunk computed of a prompt, whose end is all where no answer is wanted."""
        is_new = sequence.computed < chunk.end < chunk.prompt_length
        if is_new:
            sequence.computed = chunk.end
        if is_new or scores:
            events.append(sequence.event(scores=scores))
        if not sequence.request.max_tokens and chunk.end == len(sequence.tokens) - 1:
            last = sequence.event(reason=FinishReason.LENGTH)
            events += (replace(last, choice=choice) for choice in sequence.choices)
            self._rows.leave(sequence)
            sequence.table.release()

    def _append(self, sequence: SequenceState, drawn: Drawn, events: list[Event]) -> None:
        """Records a token."""
        to_fork = sequence.choices[1:] if sequence.request.n > 1 else ()
        sequence.tokens.append(drawn.token_id)
        sequence.undrawn -= 1
        sequence.computed = len(sequence.request.prompt_ids)
        reason = sequence.finish_reason
        events.append(sequence.event(drawn, reason))
        if reason is not None:  # its row is free for a fork, its pages only after that
            self._rows.leave(sequence)
        for choice in to_fork:
            self._rows.fork(sequence, choice)
        if reason is not None:
            sequence.table.release()

    def _accept(
        self, sequence: SequenceState, chunk: Chunk, drawn: Sequence[Drawn], events: list[Event]
    ) -> None:
        """Records the tokens of a sequence that had guesses; wrong ones are written over."""
        assert drawn, "the first token is no guess"
        rejected = chunk.guesses + 1 - len(drawn)
        self.checks += 1
        self.guesses += chunk.guesses
        sequence.turn.served -= rejected  # nobody asked for them
        sequence.undrawn += len(drawn) - 1
        for token in drawn:
            self.accepted += token.accepted
            self._append(sequence, token, events)
            if not sequence.running:
                return
        sequence.planned = len(sequence.tokens) - 1

    def _drop(self, sequences: Iterable[SequenceState]) -> None:
        for sequence in sequences:
            if sequence.running:
                self._rows.leave(sequence)
            else:
                self._queue.remove(sequence)
            sequence.table.release()


def _has_readers(answers: Iterable[SequenceState]) -> bool:
    """Returns True if somebody may read one of these answers as it comes."""
    return any(sequence.request.priority is Priority.INTERACTIVE for sequence in answers)
