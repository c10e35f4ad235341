"""Submission: a request on its way through the engine's thread, as its caller sees it."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum

from serving.errors import ContextTooLong, ServingError
from serving.scheduling.request import Event, FinishReason, Request


class Queued(Enum):
    """The first thing that a mailbox gets, unless the request was refused."""

    QUEUED = "queued"


@dataclass
class Mailbox:
    """Queue of a request's events, from the engine's thread into the caller's loop."""

    loop: asyncio.AbstractEventLoop
    choices: set[int]  # those that have not ended
    items: asyncio.Queue[Event | Queued | ServingError] = field(default_factory=asyncio.Queue)
    sent: float = field(default_factory=time.monotonic)
    latest: dict[int, float] = field(default_factory=dict)  # time of the last token, by choice

    def put(self, item: Event | Queued | ServingError) -> None:
        """Adds an item; called by the engine's thread."""
        # RuntimeError: the loop is closed when the process ends in the middle of an answer.
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)


class Uncomputed:
    """The events of a request that asks neither for tokens nor for logprobs: the ends of choices.

    It is used as a Submission is, and reaches no engine.

    Raises ContextTooLong for a prompt of more than `max_context` tokens.
    """

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
    (contextlib.aclosing) to cancel the request. Used by the coroutines of one event loop.

    Args:
        num_choices: choices of the request.
        send: called once, to put the request into the engine's inbox; may raise a ServingError.
        leave: called once after that, when the iterator is left for whatever reason.
    """

    def __init__(
        self,
        num_choices: int,
        send: Callable[["Submission", Mailbox], None],
        leave: Callable[[], None],
    ) -> None:
        self.choices = set(range(num_choices))
        """Choices whose events still come."""
        self._send, self._leave = send, leave
        self._mailbox: Mailbox | None = None
        self._is_queued = self._has_left = False

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
        if self._mailbox is not None and not self._has_left:
            self._leave()
        self._has_left = True

    async def _next(self) -> Event | Queued:
        try:
            if self._mailbox is None:
                mailbox = Mailbox(asyncio.get_running_loop(), set(self.choices))
                self._send(self, mailbox)
                self._mailbox = mailbox
            item = await self._mailbox.items.get()
            if isinstance(item, ServingError):
                raise item
        except BaseException:
            await self.aclose()
            raise
        self._is_queued = True
        return item
