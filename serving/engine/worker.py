"""Worker: the one thread that steps the engine, and the queues into and out of it.

Callers are coroutines of an asyncio loop. `submit` puts a request into the thread's inbox and
returns an async iterator of its events; leaving that iterator, for whatever reason, cancels the
request. Nothing else crosses: only the thread touches the engine.

    submit ──> inbox ──> engine.add ─> engine.step ─> events ──> mailbox ──> async for
    leave  ──> inbox ──> engine.cancel        (`end`: of one choice)

Steps overlap in the engine, so a step's events come with the next one; the engine has work until it
has given them all. A cancelled request gives its pages back before the next step is planned.

If a step raises, every request that runs ends with EngineFailure, and so does every later one. If
taking in a request raises, that request alone ends with it.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from serving.engine.engine import Engine
from serving.engine.metrics import Metrics
from serving.errors import DeadlineExceeded, EngineFailure, ServingError, Unavailable
from serving.scheduling.request import Event, FinishReason, Request

_log = logging.getLogger(__name__)


@dataclass
class _Mailbox:
    """Queue of a request's events, from the engine's thread into the caller's loop."""

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event | ServingError]
    choices: set[int]  # those that have not ended
    sent: float  # time.monotonic()
    # Time of the latest event, by choice.
    latest: dict[int, float] = field(default_factory=dict)

    def put(self, item: Event | ServingError) -> None:
        # RuntimeError: the loop is closed when the process ends in the middle of an answer.
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.events.put_nowait, item)


@dataclass(frozen=True)
class _Submit:
    request: Request
    mailbox: _Mailbox


@dataclass(frozen=True)
class _Cancel:
    request_id: str
    choice: int | None = None  # None: all of them


@dataclass(frozen=True)
class _Stop:
    pass


class EngineWorker:
    """Runs an engine in a thread of its own from `start` until `stop`, and times its tokens.

    Args:
        engine: touched by that thread alone.
        metrics: counts tokens and their times.
        explain: called when a step has raised; returns a better reason than EngineFailure, or None.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        explain: Callable[[], ServingError | None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._explain = explain
        self._metrics = metrics
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | _Stop] = queue.SimpleQueue()
        self._mailboxes: dict[str, _Mailbox] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._draining = False
        self._open: dict[str, set[int]] = {}  # of the callers' loop: choices that go on
        self._final_error: ServingError = Unavailable("the server was stopped")
        self.ended = threading.Event()

    @property
    def has_failed(self) -> bool:
        """True if the engine broke; every request then ends with EngineFailure."""
        return isinstance(self._final_error, EngineFailure)

    @property
    def num_under_way(self) -> int:
        """Number of requests whose iterators have not been left."""
        return len(self._open)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def drain(self) -> None:
        """Refuses every later request; those that run go on."""
        self._draining = True

    def stop(self) -> None:
        """Ends the thread after the current step. Requests that still run end with Unavailable."""
        self._draining = True
        self._inbox.put(_Stop())
        self._thread.join()

    def abandon(self, error: ServingError) -> None:
        """Ends every request, now and later, with this error.

        The thread is not waited for, because it may be inside a step that never ends.
        """
        self._draining, self._final_error = True, error
        self._end_all()

    async def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        """Yields the request's events until each choice had one with a finish reason, or `end`.

        Close the iterator (contextlib.aclosing) to cancel. Raises Unavailable while draining,
        EngineFailure if the engine broke, DeadlineExceeded, and the errors of `Scheduler.add`.
        """
        if self._draining:
            raise Unavailable("the server is shutting down; send the request to another one")
        loop = asyncio.get_running_loop()
        mailbox = _Mailbox(loop, asyncio.Queue(), set(range(request.n)), time.monotonic())
        self._inbox.put(_Submit(request, mailbox))
        # The thread empties the inbox once more after it has set `ended`: requests put before that
        # are answered, and later ones are refused here.
        if self.ended.is_set():
            raise self._final_error
        choices = self._open[request.id] = set(range(request.n))
        try:
            while choices:
                item = await mailbox.events.get()
                if isinstance(item, ServingError):
                    raise item
                if item.finish_reason is not None:
                    choices.discard(item.choice)
                yield item
        finally:
            del self._open[request.id]
            self._inbox.put(_Cancel(request.id))

    def end(self, request_id: str, choice: int) -> None:
        """Computes no more of a choice that has had a token, because its text has ended.

        Events that were sent before still come. To be called by the coroutine that iterates.
        """
        self._open[request_id].discard(choice)
        self._inbox.put(_Cancel(request_id, choice))

    def _run(self) -> None:
        try:
            while self._take_in():
                events = self._engine.step(time.monotonic())
                now = time.monotonic()
                for event in events:
                    self._deliver(event, now)
        except BaseException:
            reason = self._explain()
            if reason is None:
                _log.exception("the engine failed")
                reason = EngineFailure("the engine failed; see the server's log")
            self._final_error = reason
        self._end_all()

    def _end_all(self) -> None:
        self.ended.set()
        for mailbox in self._mailboxes.copy().values():
            mailbox.put(self._final_error)
        with suppress(queue.Empty):
            while True:
                message = self._inbox.get_nowait()
                if isinstance(message, _Submit):
                    message.mailbox.put(self._final_error)

    def _take_in(self) -> bool:
        """Empties the inbox, and waits for a message if there is no work; False means stop."""
        while not (self._inbox.empty() and self._engine.has_work):
            match self._inbox.get():
                case _Submit(request, mailbox):
                    try:
                        self._engine.add(request)
                        self._mailboxes[request.id] = mailbox
                    except ServingError as error:
                        mailbox.put(error)
                    except Exception:
                        # A fault of ours in one request must not end the others.
                        _log.exception("the engine could not take in request %s", request.id)
                        mailbox.put(EngineFailure("the request failed; see the server's log"))
                case _Cancel(request_id, choice):
                    self._cancel(request_id, choice)
                case _Stop():
                    return False
        return True

    def _cancel(self, request_id: str, choice: int | None) -> None:
        mailbox = self._mailboxes.get(request_id)
        if mailbox is None:
            return  # it has ended
        self._engine.cancel(request_id, choice)
        mailbox.choices = set() if choice is None else mailbox.choices - {choice}
        if not mailbox.choices:
            del self._mailboxes[request_id]

    def _deliver(self, event: Event, now: float) -> None:
        mailbox = self._mailboxes.get(event.request_id)
        if mailbox is None:
            return  # another of its choices met the deadline
        if event.finish_reason is FinishReason.DEADLINE:
            del self._mailboxes[event.request_id]
            self._engine.cancel(event.request_id)
            mailbox.put(DeadlineExceeded("the deadline passed before the answer was complete"))
            return
        before = mailbox.latest.get(event.choice)
        if before is not None:
            self._metrics.next_token(now - before)
        else:
            self._metrics.first_token(now - mailbox.sent)
        mailbox.latest[event.choice] = now
        if event.finish_reason is not None:
            mailbox.choices.discard(event.choice)
        if not mailbox.choices:
            del self._mailboxes[event.request_id]
        mailbox.put(event)
