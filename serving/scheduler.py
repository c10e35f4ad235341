"""Which tokens the next step computes: queue, page pool and progress, in plain Python.

A step is three calls: `plan()` chooses, the engine computes, `commit(plan, tokens)` records and
tells what happened.

    waiting --(a row and all its pages are free)--> running --(eos, length, cancel)--> gone

Every step takes one token of each sequence that is past its prompt, then fills what is left of the
token budget with prompt chunks in order of arrival; so a long prompt delays the others by one
chunk, not by its length. A request is admitted when the pages of its longest possible outcome are
free, so that nothing admitted can fail for lack of pages.

Worked example: budget 8, page size 4. A (prompt 3, max_tokens 2) and B (prompt 10, max_tokens 1):
A gets ceil(5/4) = 2 pages and B ceil(11/4) = 3. Step 1 takes A's 3 tokens and B's first 5; step 2
takes A's one token and B's other 5, and finishes both.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from serving.errors import ContextTooLong, Overloaded
from serving.request import Event, FinishReason, Request, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine can hold."""

    num_pages: int
    page_size: int
    max_sequences: int  # rows of a step
    max_step_tokens: int  # tokens of a step, at least max_sequences
    max_context: int  # tokens of one sequence
    max_waiting: int  # requests in the queue


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The part of one sequence that a step computes."""

    request_id: str
    token_ids: tuple[int, ...]
    start: int  # position of the first of them
    pages: tuple[int, ...]  # all pages of the sequence
    samples: bool  # whether the token after the chunk is drawn
    sampling: SamplingParams

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One step: plain data. Chunks of one token come first."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(kw_only=True, eq=False)
class _Sequence:
    request: Request
    token_ids: list[int]  # prompt and what was generated
    pages: tuple[int, ...] = ()
    computed: int = 0  # tokens whose keys and values are cached

    @property
    def remaining(self) -> int:
        return len(self.token_ids) - self.computed

    @property
    def generated(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)


@dataclass
class Scheduler:
    """Owns the queue, the pages and every sequence's progress. Not thread-safe."""

    limits: Limits
    _waiting: deque[_Sequence] = field(default_factory=deque)
    _running: dict[str, _Sequence] = field(default_factory=dict)
    _free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free = list(range(self.limits.num_pages))

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    def add(self, request: Request) -> None:
        """Queues a request. Raises ContextTooLong if it can never fit, Overloaded if too many wait.

        The prompt must leave room for at least one token; the answer is cut at the context's end.
        """
        prompt = len(request.prompt_ids)
        room = min(self.limits.max_context, self.limits.num_pages * self.limits.page_size)
        if prompt >= room:
            raise ContextTooLong(
                f"the prompt has {prompt} tokens; this server holds {room} tokens of prompt and "
                "answer together: shorten the messages"
            )
        if len(self._waiting) >= self.limits.max_waiting:
            raise Overloaded(
                f"{len(self._waiting)} requests are waiting already; try again shortly"
            )
        self._waiting.append(_Sequence(request=request, token_ids=list(request.prompt_ids)))

    def cancel(self, request_id: str) -> None:
        """Forgets a request and frees its pages; does nothing if it has ended already."""
        if request_id in self._running:
            self._release(request_id)
        else:
            self._waiting = deque(s for s in self._waiting if s.request.id != request_id)

    def plan(self) -> Plan:
        """The next step; empty if there is no work."""
        self._admit()
        budget = self.limits.max_step_tokens
        decodes = [s for s in self._running.values() if s.remaining == 1]
        chunks = [self._chunk(s, 1) for s in decodes]
        budget -= len(chunks)
        singles, longer = chunks, list[Chunk]()
        for sequence in self._running.values():
            if sequence.remaining > 1 and budget > 0:
                chunk = self._chunk(sequence, min(sequence.remaining, budget))
                budget -= len(chunk.token_ids)
                (longer if len(chunk.token_ids) > 1 else singles).append(chunk)
        return Plan(chunks=(*singles, *longer))

    def commit(self, plan: Plan, tokens: Sequence[int]) -> list[Event]:
        """Records a step: `tokens[i]` follows chunk i, and counts where that chunk samples.

        Sequences that were cancelled since `plan` are passed over.
        """
        events = []
        for chunk, token in zip(plan.chunks, tokens, strict=True):
            sequence = self._running.get(chunk.request_id)
            if sequence is None:
                continue
            sequence.computed = chunk.end
            if not chunk.samples:
                continue
            sequence.token_ids.append(token)
            reason = self._finish_reason(sequence)
            events.append(Event(request_id=chunk.request_id, token_id=token, finish_reason=reason))
            if reason is not None:
                self._release(chunk.request_id)
        return events

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.limits.max_sequences:
            sequence = self._waiting[0]
            need = -(-self._longest(sequence.request) // self.limits.page_size)
            if need > len(self._free):
                return  # in order of arrival: nobody overtakes a request that waits for pages
            self._waiting.popleft()
            sequence.pages = tuple(self._free.pop() for _ in range(need))
            self._running[sequence.request.id] = sequence

    def _longest(self, request: Request) -> int:
        room = min(self.limits.max_context, self.limits.num_pages * self.limits.page_size)
        return min(len(request.prompt_ids) + request.max_tokens, room)

    def _chunk(self, sequence: _Sequence, size: int) -> Chunk:
        start = sequence.computed
        return Chunk(
            request_id=sequence.request.id,
            token_ids=tuple(sequence.token_ids[start : start + size]),
            start=start,
            pages=sequence.pages,
            samples=size == sequence.remaining,
            sampling=sequence.request.sampling,
        )

    def _finish_reason(self, sequence: _Sequence) -> FinishReason | None:
        if sequence.token_ids[-1] in sequence.request.eos_ids:
            return FinishReason.STOP
        if len(sequence.token_ids) >= self._longest(sequence.request):
            return FinishReason.LENGTH
        return None

    def _release(self, request_id: str) -> None:
        self._free.extend(self._running.pop(request_id).pages)
