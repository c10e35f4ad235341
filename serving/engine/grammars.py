"""Grammars: which tokens may follow in the answers that have a form, or only some ids at all.

Each choice of such a request has a matcher of its own, which is moved by committed tokens alone, so
that a preempted or failed step has nothing to take back. Masks are computed after the walk of their
step was launched, while the devices run it, in threads of their own: llguidance works without the
interpreter's lock.

A row whose mask is not there when the patience of the step ends sits the step out. Its matcher
goes on, and has the mask for a later step. As long as a matcher is that slow it is computed in a
thread apart, and not waited for, so that it delays no other answer again.

The ids that a request allows are one mask for all its rows, made when the request comes; a row that
has a form too draws what both allow.

https://github.com/guidance-ai/llguidance
"""

import logging
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from time import monotonic

import numpy as np

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.continuation import Continuation
from mixtral_jax.structure.form import Form
from serving.engine.device import Masks
from serving.scheduling.request import Event, Request
from serving.scheduling.step_plan import StepPlan

_log = logging.getLogger(__name__)

PATIENCE = 0.02  # seconds
_NUM_PUMPS = 2  # threads that compute the masks of one step; more gain nothing
_NUM_SPARE = 4  # threads that go on while others are held by slow matchers
_NONE_ALLOWED = (
    "allowed_token_ids has no token that the answer's form lets follow; allow more of them, or "
    "leave them out"
)


class _State(Enum):
    IDLE = "idle"  # what may follow is not known
    BUSY = "busy"  # a thread computes it, or is about to: the answer is that thread's
    READY = "ready"  # the continuation is that of its position


@dataclass(eq=False)
class _Answer:
    """Place of one choice of a request in its grammar."""

    continuation: Continuation
    trigger: int | None
    """The id that must be drawn before the grammar begins; None once it has begun."""
    takes_turns: bool
    """True if forced tokens are drawn one by one, because their logprobs were asked for, or
    because they must be among the allowed ids too."""
    position: int = 0
    """Number of its tokens that are known."""
    pending: list[int] = field(default_factory=list)
    """Drawn tokens that the continuation has not taken in."""
    state: _State = _State.IDLE
    is_slow: bool = False
    problem: str = ""
    """Why it cannot go on; empty as long as it can."""

    def compute(self, patience: float) -> None:
        """Takes in the pending tokens, and finds what may follow. Raises nothing.

        An answer that takes longer than `patience` seconds is slow.
        """
        began = monotonic()
        try:
            pending, self.pending = self.pending, []
            self.continuation.advance(pending)
        except StructureError as error:
            self.problem = f"the answer cannot be held to its form any longer: {error}"
        except BaseException:  # a panic of the library is no Exception
            _log.exception("a matcher failed")
            self.problem = "the answer cannot be held to its form; see the server's log"
        self.is_slow = monotonic() - began > patience
        self.state = _State.READY  # at last, for the engine's thread goes on with it


class Grammars:
    """Makes the masks of rows whose requests have a form or allowed ids; the engine's MaskSource.

    Args:
        words: number of words of a mask, ceil(V / 32).
        patience: seconds that a step waits for its masks at most.
    """

    def __init__(self, words: int, patience: float = PATIENCE) -> None:
        self._words, self._patience = words, patience
        self._forms: dict[str, tuple[Form, Request]] = {}
        self._allowed: dict[str, np.ndarray] = {}  # [words] i32 of requests with allowed ids
        self._answers: dict[str, dict[int, _Answer]] = {}
        self._open: dict[str, set[int]] = {}  # choices that have not ended
        self._pool = ThreadPoolExecutor(_NUM_PUMPS + _NUM_SPARE, "masks")
        self._slow_pool = ThreadPoolExecutor(1, "slow masks")

    def add(self, request: Request) -> Request:
        """Takes in a request; returns it as it must be scheduled.

        Where it is to go on after the model's end, it does so for as long as its grammar has more
        to say, but not beyond.
        """
        form = request.form
        if form is None and not request.allowed_ids:
            return request
        self._answers[request.id] = {}
        self._open[request.id] = set(range(request.n))
        if form is None:
            self._allowed[request.id] = mask_of(request.allowed_ids, self._words)
            return request
        assert isinstance(form, Form)
        assert form.warm.words == self._words, "the form is of another vocabulary"
        self._forms[request.id] = form, request
        if request.allowed_ids:
            # A form says itself when the answer may end.
            ids = request.allowed_ids | form.warm.end_ids
            self._allowed[request.id] = mask_of(ids, self._words)
        min_tokens = request.min_tokens if request.eos_ids else request.max_tokens
        return replace(request, eos_ids=request.eos_ids | form.warm.end_ids, min_tokens=min_tokens)

    def forget(self, request_id: str, choice: int | None = None) -> None:
        """Forgets a request that has ended, or one choice of it."""
        if request_id not in self._open:
            return
        choices = self._open[request_id]
        if choice is not None:
            choices.discard(choice)
            self._answers[request_id].pop(choice, None)
        if choice is None or not choices:
            del self._answers[request_id], self._open[request_id]
            self._forms.pop(request_id, None)
            self._allowed.pop(request_id, None)

    def has_rows(self, plans: Sequence[StepPlan]) -> bool:
        """Returns True if any row of this step draws in an answer that needs masks."""
        return bool(self._open) and any(
            chunk.samples and chunk.request_id in self._open
            for plan in plans
            for chunk in plan.chunks
        )

    def advance(self, events: Sequence[Event]) -> None:
        """Takes in what has happened: tokens, and ends."""
        for event in events:
            if event.request_id not in self._open:
                continue
            if event.finish_reason is not None:
                # Without a token a request ends with all its choices.
                self.forget(event.request_id, event.choice if event.drawn else None)
            elif event.drawn is not None and event.request_id in self._forms:
                self._take(self._answer(event.request_id, event.choice), event.drawn.token_id)

    def masks(self, plans: Sequence[StepPlan]) -> Masks:
        """Returns the masks of a step that was walked; waits no longer than its patience."""
        rows: dict[tuple[int, int], _Answer] = {}
        late: set[tuple[int, int]] = set()
        free: list[tuple[int, int]] = []  # rows with allowed ids, and no grammar at this place
        for i, plan in enumerate(plans):
            for j, chunk in enumerate(plan.chunks):
                if not chunk.samples or chunk.choice not in self._open.get(chunk.request_id, ()):
                    continue
                if chunk.request_id not in self._forms:
                    free.append((i, j))
                    continue
                answer = self._answer(chunk.request_id, chunk.choice)
                if answer.position != chunk.end - chunk.prompt_length:
                    late.add((i, j))  # it follows a token that was never drawn
                elif answer.trigger is None:
                    rows[i, j] = answer
                elif chunk.request_id in self._allowed:
                    free.append((i, j))
        self._compute(list(rows.values()))
        allowed = _Rows(plans, self._words)
        for i, j in free:
            allowed.set(i, j, self._allowed[plans[i].chunks[j].request_id])
        forced: dict[tuple[int, int], tuple[int, ...]] = {}
        failed: dict[str, str] = {}
        refused: dict[str, str] = {}
        for (i, j), answer in rows.items():
            request_id = plans[i].chunks[j].request_id
            only = self._allowed.get(request_id)
            if answer.state is not _State.READY:
                late.add((i, j))
            elif answer.problem:
                failed[request_id] = answer.problem
            elif answer.continuation.forced and not answer.takes_turns:
                forced[i, j] = tuple(answer.continuation.forced)
            else:
                mask = answer.continuation.next_mask()
                if only is not None and not (mask := mask & only).any():
                    refused[request_id] = _NONE_ALLOWED
                else:
                    allowed.set(i, j, mask)
        return Masks(tuple(allowed.masks), frozenset(late), forced, failed, refused)

    def _answer(self, request_id: str, choice: int) -> _Answer:
        answers = self._answers[request_id]
        if choice not in answers:
            form, request = self._forms[request_id]
            answers[choice] = _Answer(
                continuation=Continuation(form.matcher()),
                trigger=form.begins_after,
                takes_turns=request.sampling.top_logprobs is not None or bool(request.allowed_ids),
            )
        return answers[choice]

    def _take(self, answer: _Answer, token: int) -> None:
        """Takes in a token of an answer that goes on."""
        answer.position += 1
        if answer.trigger is not None and token != answer.trigger:
            return
        answer.trigger = None
        assert answer.state is not _State.BUSY, "a row without a mask has drawn"
        if answer.continuation.forced:
            only = answer.continuation.forced.popleft()
            assert only == token, "another token was drawn than the only one"
            return
        answer.pending.append(token)
        answer.state = _State.IDLE

    def _compute(self, answers: list[_Answer]) -> None:
        """Computes what is missing, for as long as the step can wait for it."""
        todo = deque[_Answer]()
        for answer in answers:
            if answer.state is not _State.IDLE:
                continue
            answer.state = _State.BUSY
            if answer.is_slow:
                self._slow_pool.submit(answer.compute, self._patience)
            else:
                todo.append(answer)
        if not todo:
            return
        count, patience = min(_NUM_PUMPS, len(todo)), self._patience
        wait([self._pool.submit(_pump, todo, patience) for _ in range(count)], patience)
        for answer in _emptied(todo):
            answer.state = _State.IDLE  # it is begun in a later step


def mask_of(ids: Collection[int], words: int) -> np.ndarray:
    """Returns the mask [words] i32 of these ids, each below 32 * words."""
    bits = np.zeros(32 * words, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


class _Rows:
    """The masks of a step's rows, for as many plans as have any."""

    def __init__(self, plans: Sequence[StepPlan], words: int) -> None:
        self._plans, self._words = plans, words
        self.masks: list[np.ndarray | None] = [None] * len(plans)

    def set(self, plan: int, chunk: int, mask: np.ndarray) -> None:
        """Sets the mask of a row."""
        rows = self.masks[plan]
        if rows is None:
            shape = (len(self._plans[plan].chunks), self._words)
            rows = self.masks[plan] = np.full(shape, -1, np.int32)
        rows[chunk] = mask


def _pump(todo: deque[_Answer], patience: float) -> None:
    """Computes answers until none remains."""
    for answer in _emptied(todo):
        answer.compute(patience)


def _emptied(todo: deque[_Answer]) -> Iterator[_Answer]:
    """Yields answers, each to one of the threads that empty the same queue."""
    with suppress(IndexError):
        while True:
            yield todo.popleft()
