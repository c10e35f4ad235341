"""The one thread that steps the engine, and the way in and out of it.

Callers live in an asyncio loop. `submit` puts a request into the thread's inbox and returns an
async iterator of what happens to it; leaving that iterator, for whatever reason, cancels the
request. Nothing else crosses: the engine is touched by the thread alone.

    submit ──> inbox ──> engine.add ─> engine.step ─> events ──> mailbox ──> async for
    leave  ──> inbox ──> engine.cancel

If a step raises, every request under way ends with EngineFailure, and so does every later one.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass

from serving.engine import Engine
from serving.errors import EngineFailure, ServingError, Unavailable
from serving.request import Event, Request

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Mailbox:
    """Where a request's events are put, from the engine's thread into the caller's loop."""

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event | ServingError]

    def put(self, item: Event | ServingError) -> None:
        # RuntimeError: the loop is gone when the process ends in the middle of an answer.
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.events.put_nowait, item)


@dataclass(frozen=True)
class _Submit:
    request: Request
    mailbox: _Mailbox


@dataclass(frozen=True)
class _Cancel:
    request_id: str


@dataclass(frozen=True)
class _Stop:
    pass


class EngineWorker:
    """Runs an engine in a thread of its own from `start` until `stop`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | _Stop] = queue.SimpleQueue()
        self._mailboxes: dict[str, _Mailbox] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._draining = False
        self._parting: ServingError = Unavailable("the server was stopped")
        self.ended = threading.Event()

    @property
    def has_failed(self) -> bool:
        return isinstance(self._parting, EngineFailure)

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> None:
        """From now on requests are refused; those under way go on."""
        self._draining = True

    def stop(self) -> None:
        """Ends the thread after the step under way. What still runs ends with Unavailable."""
        self._draining = True
        self._inbox.put(_Stop())
        self._thread.join()

    async def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        """Yields the request's events, the last of which has a finish reason.

        Raises Unavailable while draining, EngineFailure if the engine broke, and whatever
        `Scheduler.add` refuses. Close the iterator (contextlib.aclosing) to cancel.
        """
        if self._draining:
            raise Unavailable("the server is shutting down; send the request to another one")
        mailbox = _Mailbox(asyncio.get_running_loop(), asyncio.Queue())
        self._inbox.put(_Submit(request, mailbox))
        # The thread empties the inbox once more after it has set `ended`: what was put before that
        # is answered, and what was put later is refused here.
        if self.ended.is_set():
            raise self._parting
        try:
            while True:
                item = await mailbox.events.get()
                if isinstance(item, ServingError):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._inbox.put(_Cancel(request.id))

    def _run(self) -> None:
        try:
            while self._take_in():
                for event in self._engine.step():
                    self._deliver(event)
        except BaseException:
            _log.exception("the engine failed")
            self._parting = EngineFailure("the engine failed; see the server's log")
        self.ended.set()
        for mailbox in self._mailboxes.values():
            mailbox.put(self._parting)
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, _Submit):
                message.mailbox.put(self._parting)

    def _take_in(self) -> bool:
        """Empties the inbox, waiting for a message where there is no work; False means stop."""
        while not (self._inbox.empty() and self._engine.has_work):
            match self._inbox.get():
                case _Submit(request, mailbox):
                    try:
                        self._engine.add(request)
                        self._mailboxes[request.id] = mailbox
                    except ServingError as error:
                        mailbox.put(error)
                case _Cancel(request_id):
                    if self._mailboxes.pop(request_id, None):
                        self._engine.cancel(request_id)
                case _Stop():
                    return False
        return True

    def _deliver(self, event: Event) -> None:
        mailbox = self._mailboxes[event.request_id]
        mailbox.put(event)
        if event.finish_reason is not None:
            del self._mailboxes[event.request_id]
