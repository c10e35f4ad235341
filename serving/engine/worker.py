"""Worker: the one thread that steps the engine, and the queues into and out of it.

Callers are coroutines of an asyncio loop. `submit` puts a request into the thread's inbox and
returns an async iterator of its events; leaving that iterator, for whatever reason, cancels the
request. Nothing else crosses: only the thread touches the engine.

    submit ──> inbox ──> engine.add ─> engine.step ─> events ──> mailbox ──> async for
    leave  ──> inbox ──> engine.cancel        (`end`: of one choice)

Steps overlap in the engine, so a step's events come with the next one; the engine has work until it
has given them all. A cancelled request gives its pages back before the next step is planned.

Whatever taking in a request raises ends that request alone. A step that fails is the engine's
affair (recovery.py); if `step` raises all the same, every request that runs ends with
EngineFailure, and so does every later one. `standing` tells for how long the thread has been in its
turn, for those who watch it from outside.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from serving.engine.metrics import Metrics
from serving.engine.submission import Mailbox, Queued, Submission
from serving.errors import (
    DeadlineExceeded,
    EngineFailure,
    InvalidParameter,
    ServingError,
    Unavailable,
)
from serving.scheduling.request import Event, FinishReason, Request

_log = logging.getLogger(__name__)
_TOO_LATE = "the deadline passed before the answer was complete"
_FAILED = "the model failed on this request; see the server's log"


class Stepped(Protocol):
    """An engine, as its worker drives it: all but `has_room` from one thread."""

    @property
    def has_work(self) -> bool:
        """True if a step would compute something, or events are still to come."""

    def add(self, request: Request) -> None:
        """Queues a request; may raise whatever is wrong with it."""

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Forgets a request, or one choice of it; does nothing if it has ended."""

    def step(self, now: float) -> list[Event]:
        """Does a turn at the time `now` of time.monotonic(), and returns what has happened."""

    def has_room(self, n: int, caller: str) -> bool:
        """Returns True if n choices would be queued now; an estimate, for any thread."""


@dataclass(frozen=True)
class _Submit:
    request: Request
    mailbox: Mailbox


@dataclass(frozen=True)
class _Cancel:
    request_id: str
    choice: int | None = None  # None: all of them


@dataclass(frozen=True)
class _Call:
    """A function to be called between two steps."""

    function: Callable[[], None]
    done: "Future[None]"


@dataclass(frozen=True)
class _Stop:
    pass


class EngineWorker:
    """Runs an engine in a thread of its own from `start` until `stop`, and times its tokens.

    Args:
        engine: touched by that thread alone, but for `has_room`.
        metrics: counts tokens and their times.
        explain: called when a step has raised; returns a better reason than EngineFailure, or None.
    """

    def __init__(
        self,
        engine: Stepped,
        metrics: Metrics,
        explain: Callable[[], ServingError | None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._explain = explain
        self._metrics = metrics
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | _Call | _Stop] = queue.SimpleQueue()
        self._mailboxes: dict[str, Mailbox] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._draining = self._is_abandoned = False
        self._open: dict[str, Submission] = {}  # of the callers' loop
        self._unread: dict[str, Request] = {}  # in the inbox
        self._turn_began: float | None = None  # time.monotonic(); None while it waits for work
        self._last_step = 0.0  # seconds
        self._final_error: ServingError = Unavailable("the server was stopped")
        self.ended = threading.Event()
        metrics.time_steps(self.step_seconds)

    @property
    def has_failed(self) -> bool:
        """True if the engine broke; every request then ends with EngineFailure."""
        return isinstance(self._final_error, EngineFailure)

    @property
    def num_under_way(self) -> int:
        """Number of requests whose iterators have not been left."""
        return len(self._open)

    def standing(self, now: float) -> float:
        """Returns for how many seconds the present turn lasts; 0 without work.

        `now` is time.monotonic(). May be called from any thread.
        """
        began = self._turn_began
        return 0.0 if began is None or self.ended.is_set() else max(0.0, now - began)

    def step_seconds(self) -> float:
        """Returns the seconds of the last step, or of the present one if that lasts longer."""
        return max(self._last_step, self.standing(time.monotonic()))

    def has_room(self, n: int, caller: str) -> bool:
        """Returns True if the queue would take a request of n choices of this caller now.

        This is an estimate that costs next to nothing, to refuse a request before it is rendered;
        `Submission.accepted` tells for certain.
        """
        unread = self._unread.copy().values() if self._unread else ()
        return self._engine.has_room(
            n + sum(request.n for request in unread if request.caller == caller), caller
        )

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def drain(self) -> None:
        """Refuses every later request; those that run go on."""
        self._draining = True

    def stop(self, seconds: float | None = None) -> bool:
        """Ends the thread after the current step. Requests that still run end with Unavailable.

        Returns False if the thread has not ended after so many seconds; None waits for ever. After
        `abandon` it is not waited for.
        """
        self._draining = True
        self._inbox.put(_Stop())
        self._thread.join(0.0 if self._is_abandoned else seconds)
        return not self._thread.is_alive()

    def abandon(self, error: ServingError) -> None:
        """Ends every request, now and later, with this error.

        The thread is not waited for, because it may be inside a step that never ends.
        """
        self._draining, self._is_abandoned, self._final_error = True, True, error
        self._end_all()

    def submit(self, request: Request) -> Submission:
        """Returns an iterator of the request's events until each choice had one with a finish
        reason, or `end`.

        Close the iterator (contextlib.aclosing) to cancel. Its use raises Unavailable while
        draining, EngineFailure if the engine broke or the request breaks it, DeadlineExceeded, and
        the errors of `Scheduler.add`.
        """

        def send(submission: Submission, mailbox: Mailbox) -> None:
            if self._draining:
                raise Unavailable("the server is shutting down; send the request to another one")
            self._unread[request.id] = request
            self._inbox.put(_Submit(request, mailbox))
            # The thread empties the inbox once more after it has set `ended`: requests put before
            # that are answered, and later ones are refused here.
            if self.ended.is_set():
                raise self._final_error
            self._open[request.id] = submission

        def leave() -> None:
            del self._open[request.id]
            self._inbox.put(_Cancel(request.id))

        return Submission(request.n, send, leave)

    def end(self, request_id: str, choice: int) -> None:
        """Computes no more of a choice that has had a token, because its text has ended.

        Events that were sent before still come. To be called by the coroutine that iterates.
        """
        self._open[request_id].choices.discard(choice)
        self._inbox.put(_Cancel(request_id, choice))

    def call(self, function: Callable[[], None]) -> None:
        """Has the engine's thread call a function between two steps, and waits for it.

        For any other thread. Raises what the function raises, which ends nothing else, and
        Unavailable or EngineFailure if the engine has ended.
        """
        done = Future[None]()
        self._inbox.put(_Call(function, done))
        if self.ended.is_set():  # then nobody may take it out any more
            raise self._final_error
        done.result()

    def _run(self) -> None:
        try:
            while self._take_in():
                began = self._turn_began = time.monotonic()
                events = self._engine.step(began)
                now = time.monotonic()
                self._last_step = now - began
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
                elif isinstance(message, _Call):
                    message.done.set_exception(self._final_error)

    def _take_in(self) -> bool:
        """Empties the inbox, and waits for a message if there is no work; False means stop."""
        while not (self._inbox.empty() and self._engine.has_work):
            self._turn_began = None
            message = self._inbox.get()
            self._turn_began = time.monotonic()
            match message:
                case _Submit(request, mailbox):
                    self._add(request, mailbox)
                case _Cancel(request_id, choice):
                    self._cancel(request_id, choice)
                case _Call(function, done):
                    _answer(function, done)
                case _Stop():
                    return False
        return True

    def _add(self, request: Request, mailbox: Mailbox) -> None:
        """Takes in a request; whatever that raises is for its caller alone."""
        # Before it is in the queue: `has_room`, in another thread, must not count it twice.
        self._unread.pop(request.id, None)
        try:
            self._engine.add(request)
            self._mailboxes[request.id] = mailbox
            mailbox.put(Queued.QUEUED)
        except ServingError as error:
            mailbox.put(error)
        except Exception:
            _log.exception("the engine could not take in request %s", request.id)
            mailbox.put(EngineFailure("the request failed; see the server's log"))

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
            return  # another of its choices met the deadline, or has failed
        match event.finish_reason:
            case FinishReason.DEADLINE:
                self._fail(event.request_id, DeadlineExceeded(_TOO_LATE))
                return
            case FinishReason.FAILED:
                failure = InvalidParameter if event.is_refused else EngineFailure
                self._fail(event.request_id, failure(event.problem or _FAILED))
                return
        if event.drawn is not None:
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

    def _fail(self, request_id: str, error: ServingError) -> None:
        """Ends a request with all its choices, whose rows and pages are free at once."""
        self._engine.cancel(request_id)
        self._mailboxes.pop(request_id).put(error)


def _answer(function: Callable[[], None], done: "Future[None]") -> None:
    """Calls a function; what it raises is for its caller alone."""
    try:
        function()
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(None)
