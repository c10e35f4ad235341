"""Worker: the one thread that steps the engine, and the queues into and out of it.

A request is put into the thread's inbox together with the outlet to which its events go; a turn's
events go to each outlet at once. Callers are coroutines of an asyncio loop, or of another process:
`submit` serves the former, and returns an async iterator of the events; leaving that iterator, for
whatever reason, cancels the request. Nothing else crosses: only the thread touches the engine.

    send   ──> inbox ──> engine.add ─> engine.step ─> events ──> outlet ──> mailbox ──> async for
    cancel ──> inbox ──> engine.cancel        (`end`: of one choice)

Steps overlap in the engine, so a step's events come with the next one; the engine has work until it
has given them all. A cancelled request gives its pages back before the next step is planned.

Whatever taking in a request raises ends that request alone. A step that fails is the engine's
affair (recovery.py); if `step` raises all the same, every request that runs ends with
EngineFailure, and so does every later one. `standing` tells for how long the thread has been in its
turn, for those who watch it from outside.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from serving.engine.metrics import Metrics
from serving.engine.outlet import Item, Outlet, Queued
from serving.engine.submission import LoopOutlet, Submission
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
    outlet: Outlet
    sent: float  # time.monotonic()


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


@dataclass(slots=True)
class _Answer:
    """A request that the engine has and that has not ended; of the engine's thread."""

    outlet: Outlet
    choices: set[int]  # those that have not ended
    sent: float
    latest: dict[int, float] = field(default_factory=dict)  # time of the last token, by choice


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
        self._answers: dict[str, _Answer] = {}
        self._outgoing: dict[Outlet, list[Item]] = {}  # of the present turn
        self._waits: dict[float, int] = {}  # seconds between tokens, and how often, of this turn
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._draining = self._is_abandoned = False
        self._loops: dict[asyncio.AbstractEventLoop, LoopOutlet] = {}
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
        """Number of requests of this process whose iterators have not been left."""
        return sum(outlet.num_open for outlet in self._loops.values())

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

    async def admits(self, n: int, caller: str) -> bool:
        """Returns what `has_room` does, for a service that may ask another process."""
        return self.has_room(n, caller)

    async def begin_drain(self) -> int:
        """Refuses every later request; returns the number of those that go on."""
        self.drain()
        return self.num_under_way

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
        reason, or `end`. For coroutines.

        Close the iterator (contextlib.aclosing) to cancel. Its use raises Unavailable while
        draining, EngineFailure if the engine broke or the request breaks it, DeadlineExceeded, and
        the errors of `Scheduler.add`.
        """
        return self._outlet().submit(request)

    def end(self, request_id: str, choice: int) -> None:
        """Computes no more of a choice that has had a token, because its text has ended.

        Events that were sent before still come. To be called by the coroutine that iterates.
        """
        self._outlet().end(request_id, choice)

    def _outlet(self) -> LoopOutlet:
        """Returns the outlet of the loop that runs."""
        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            outlet = LoopOutlet(self, loop)
            rest = {key: value for key, value in self._loops.items() if not key.is_closed()}
            self._loops = rest | {loop: outlet}
        return self._loops[loop]

    def send(self, request: Request, outlet: Outlet) -> None:
        """Puts a request into the inbox; all that happens to it goes to the outlet.

        For any thread. Raises Unavailable while draining, and the reason if the engine has ended.
        """
        if self._draining:
            raise Unavailable("the server is shutting down; send the request to another one")
        self._unread[request.id] = request
        self._inbox.put(_Submit(request, outlet, time.monotonic()))
        # The thread empties the inbox once more after it has set `ended`: requests put before
        # that are answered, and later ones are refused here.
        if self.ended.is_set():
            raise self._final_error

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Has a request, or one choice of it that has had a token, computed no more.

        For any thread. Does nothing if that has ended already. Events that were put into the outlet
        before stay there.
        """
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
                self._put_out()
                if self._waits:
                    self._metrics.next_tokens(self._waits)
                    self._waits = {}
        except BaseException:
            reason = self._explain()
            if reason is None:
                _log.exception("the engine failed")
                reason = EngineFailure("the engine failed; see the server's log")
            self._final_error = reason
        self._put_out()
        self._end_all()

    def _end_all(self) -> None:
        self.ended.set()
        lost = [(answer.outlet, name) for name, answer in self._answers.copy().items()]
        with suppress(queue.Empty):
            while True:
                message = self._inbox.get_nowait()
                if isinstance(message, _Submit):
                    lost.append((message.outlet, message.request.id))
                elif isinstance(message, _Call):
                    message.done.set_exception(self._final_error)
        last: dict[Outlet, list[Item]] = {}
        for outlet, name in lost:
            last.setdefault(outlet, []).append((name, self._final_error))
        for outlet, items in last.items():
            outlet.put(items)

    def _tell(self, outlet: Outlet, item: Item) -> None:
        """Adds an item to what goes out in this turn."""
        self._outgoing.setdefault(outlet, []).append(item)

    def _put_out(self) -> None:
        """Gives every outlet what was added for it."""
        if self._outgoing:
            outgoing, self._outgoing = self._outgoing, {}
            for outlet, items in outgoing.items():
                outlet.put(items)

    def _take_in(self) -> bool:
        """Empties the inbox, and waits for a message if there is no work; False means stop."""
        while not (is_empty := self._inbox.empty()) or not self._engine.has_work:
            if is_empty:
                self._put_out()
            self._turn_began = None
            message = self._inbox.get()
            self._turn_began = time.monotonic()
            match message:
                case _Submit():
                    self._add(message)
                case _Cancel(request_id, choice):
                    self._cancel(request_id, choice)
                case _Call(function, done):
                    _answer(function, done)
                case _Stop():
                    self._put_out()
                    return False
        self._put_out()
        return True

    def _add(self, sent: _Submit) -> None:
        """Takes in a request; whatever that raises is for its caller alone."""
        request, outlet = sent.request, sent.outlet
        # Before it is in the queue: `has_room`, in another thread, must not count it twice.
        self._unread.pop(request.id, None)
        try:
            self._engine.add(request)
            self._answers[request.id] = _Answer(outlet, set(range(request.n)), sent.sent)
            self._tell(outlet, (request.id, Queued.QUEUED))
        except ServingError as error:
            self._tell(outlet, (request.id, error))
        except Exception:
            _log.exception("the engine could not take in request %s", request.id)
            failure = EngineFailure("the request failed; see the server's log")
            self._tell(outlet, (request.id, failure))

    def _cancel(self, request_id: str, choice: int | None) -> None:
        answer = self._answers.get(request_id)
        if answer is None:
            return  # it has ended
        self._engine.cancel(request_id, choice)
        answer.choices = set() if choice is None else answer.choices - {choice}
        if not answer.choices:
            del self._answers[request_id]

    def _deliver(self, event: Event, now: float) -> None:
        answer = self._answers.get(event.request_id)
        if answer is None:
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
            before = answer.latest.get(event.choice)
            if before is not None:
                waited = now - before
                self._waits[waited] = self._waits.get(waited, 0) + 1
            else:
                self._metrics.first_token(now - answer.sent)
            answer.latest[event.choice] = now
        if event.finish_reason is not None:
            answer.choices.discard(event.choice)
        if not answer.choices:
            del self._answers[event.request_id]
        self._tell(answer.outlet, (event.request_id, event))

    def _fail(self, request_id: str, error: ServingError) -> None:
        """Ends a request with all its choices, whose rows and pages are free at once."""
        self._engine.cancel(request_id)
        self._tell(self._answers.pop(request_id).outlet, (request_id, error))


def _answer(function: Callable[[], None], done: "Future[None]") -> None:
    """Calls a function; what it raises is for its caller alone."""
    try:
        function()
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(None)
