"""Submission: a request on its way through the engine, as its caller sees it.

A caller is a coroutine. The events of all requests of an event loop come through one LoopOutlet,
which wakes the loop once for all that a turn of the engine brings.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from serving.engine.outlet import Inlet, Item, Queued
from serving.errors import ContextTooLong, ServingError
from serving.scheduling.request import Event, FinishReason, Request


class Mailbox:
    """Queue of a request's items, on the event loop of its caller."""

    def __init__(self) -> None:
        self._items: deque[tuple[Event | Queued | ServingError, float]] = deque()
        self._waiter: asyncio.Future[None] | None = None

    @property
    def next_came(self) -> float | None:
        """Time at which the next item came; None if it is not there, or is no event."""
        if not self._items:
            return None
        item, came = self._items[0]
        return came if isinstance(item, Event) else None

    def put(self, item: Event | Queued | ServingError, now: float) -> None:
        """Adds an item, at this time of time.monotonic()."""
        self._items.append((item, now))
        if self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            if not waiter.done():
                waiter.set_result(None)

    async def get(self) -> tuple[Event | Queued | ServingError, float]:
        """Waits for the next item; returns it and the time at which it came.

        For one coroutine at a time.
        """
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._items.popleft()


class LoopOutlet:
    """The requests of one event loop, and their mailboxes.

    All but `put` is for that loop.

    Args:
        inlet: The way to the engine.
        loop: The event loop.
    """

    def __init__(self, inlet: Inlet, loop: asyncio.AbstractEventLoop) -> None:
        self._inlet, self._loop = inlet, loop
        self._open: dict[str, Submission] = {}

    @property
    def num_open(self) -> int:
        """Number of requests whose iterators were used and have not been left."""
        return len(self._open)

    def put(self, items: Sequence[Item]) -> None:
        """Hands out items on the loop, with one call of it; for any thread."""
        # RuntimeError: the loop is closed when the process ends in the middle of an answer.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.hand_out, items)

    def hand_out(self, items: Sequence[Item]) -> None:
        """Puts items into the mailboxes of those who still wait for them."""
        now = time.monotonic()
        for request_id, item in items:
            submission = self._open.get(request_id)
            if submission is not None:
                submission.mailbox.put(item, now)

    def submit(self, request: Request) -> "Submission":
        """Returns an iterator of the request's events; see `EngineWorker.submit`."""
        return Submission(request, self)

    def end(self, request_id: str, choice: int) -> None:
        """Computes no more of a choice; see `EngineWorker.end`."""
        self._open[request_id].choices.discard(choice)
        self._inlet.cancel(request_id, choice)

    def enter(self, submission: "Submission") -> None:
        """Sends a request to the engine, whose items come into its mailbox from now on."""
        request = submission.request
        self._open[request.id] = submission
        try:
            self._inlet.send(request, self)
        except BaseException:
            del self._open[request.id]
            raise

    def leave(self, submission: "Submission") -> None:
        """Cancels a request that was entered."""
        del self._open[submission.request.id]
        self._inlet.cancel(submission.request.id)


class Uncomputed:
    """The events of a request that asks neither for tokens nor for logprobs: the ends of choices.

    It is used as a Submission is, and reaches no engine.

    Raises ContextTooLong for a prompt of more than `max_context` tokens.
    """

    next_came = None

    def __init__(self, request: Request, max_context: int) -> None:
        size = len(request.prompt_ids)
        if size > max_context:
            raise ContextTooLong.of(max_context, f"the prompt has {size}")
        ends = [
            Event(
                request_id=request.id,
                choice=choice,
                drawn=None,
                finish_reason=FinishReason.LENGTH,
                seated=time.monotonic(),
            )
            for choice in range(request.n)
        ]
        self._ends = iter(ends)
        self.came = time.monotonic()

    async def accepted(self) -> None:
        """Returns at once."""

    def __aiter__(self) -> "Uncomputed":
        return self

    async def __anext__(self) -> Event:
        for end in self._ends:
            return end
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Does nothing."""


class Submission:
    """Asynchronous iterator of a request's events; the request goes to the engine with its first
    use.

    It ends when each choice has had an event with a finish reason, or `EngineWorker.end`. Close it
    (contextlib.aclosing) to cancel the request. Used by one coroutine of the outlet's loop.

    Args:
        request: The request.
        outlet: That of the event loop.

    Attributes:
        choices: Choices whose events still come.
        came: time.monotonic() at which the last event that it gave had come to the event loop.
    """

    def __init__(self, request: Request, outlet: LoopOutlet) -> None:
        self.request = request
        self.mailbox = Mailbox()
        self.choices = set(range(request.n))
        self.came = 0.0
        self._outlet = outlet
        self._is_queued = self._has_entered = self._has_left = False

    @property
    def next_came(self) -> float | None:
        """time.monotonic() at which the next event came, if it is there already; else None."""
        return self.mailbox.next_came

    async def accepted(self) -> None:
        """Waits until the engine has queued the request; returns at once if it has already.

        Raises the errors of iterating, among them those of `Scheduler.add`.
        """
        if not self._is_queued:
            item = await self._next()
            assert item is Queued.QUEUED, "this comes before every event"

    def __aiter__(self) -> "Submission":
        return self

    async def __anext__(self) -> Event:
        while self.choices and not self._has_left:
            item = await self._next()
            if isinstance(item, Queued):
                continue
            if item.finish_reason is not None:
                self.choices.discard(item.choice)
            return item
        await self.aclose()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancels what is not computed yet. Does nothing the second time."""
        if self._has_entered and not self._has_left:
            self._outlet.leave(self)
        self._has_left = True

    async def _next(self) -> Event | Queued:
        try:
            if not self._has_entered:
                self._outlet.enter(self)
                self._has_entered = True
            item, self.came = await self.mailbox.get()
            if isinstance(item, ServingError):
                raise item
        except BaseException:
            await self.aclose()
            raise
        self._is_queued = True
        return item
