"""The pipes of all text processes, in the engine's process.

    text process ──> Submit, Leave ──> worker.send, worker.cancel ──> the engine's thread
                 <── one message a turn with all of its events    <── outlet

A pipe that is lost, because its process died or was too slow, ends the requests that came by it:
the engine frees their pages before its next step, and the other pipes go on untouched.
"""

import logging
import socket
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.structure.form import Form
from mixtral_jax.structure.specification import Grammar
from serving.engine.metrics import FINISHED, Finished, Metrics
from serving.engine.outlet import Inlet, Item, Outlet, Queued
from serving.errors import EngineFailure, InvalidParameter, ServingError
from serving.proto import texts_pb2 as pb
from serving.scheduling.request import Event, Request
from serving.texts.codec import CodecError, error_message, events_message, request_of
from serving.texts.pipe import Pipe

_log = logging.getLogger(__name__)


class Engine(Inlet, Protocol):
    """The engine's worker, as the pipes use it."""

    def has_room(self, n: int, caller: str) -> bool:
        """Returns True if the queue would take a request of n choices of this caller now."""


class AdapterCounts(Protocol):
    """Counts what adapters answer."""

    def answered(self, adapter: str, prompt_tokens: int, generation_tokens: int) -> None:
        """Counts a request that is over."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Parts of the engine's process that the messages of text processes reach."""

    engine: Engine
    metrics: Metrics
    adapters: AdapterCounts | None
    compiler: Compiler
    """Makes the matchers of grammars that a text process has tried."""
    prepare_scores: Callable[[], "Future[None]"]
    num_waiting: Callable[[], int]
    """Returns the number of choices that wait for a row."""


@dataclass(slots=True)
class _Open:
    """A request that came by a pipe and has not been left."""

    request: Request
    is_left: bool = False  # while its grammar was compiled
    ended: int = 0  # choices


class Hub:
    """Takes in the requests of all text processes.

    Args:
        parts: What they reach.

    Attributes:
        on_drain: Called, from a thread of a pipe, when a text process was told to drain all.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.on_drain: Callable[[], None] = lambda: None
        self._pipes: dict[int, TextPipe] = {}  # by the number of the process
        self._asking = ThreadPoolExecutor(2, thread_name_prefix="questions")

    @property
    def num_under_way(self) -> int:
        """Number of requests that have not been left."""
        return sum(pipe.num_under_way for pipe in tuple(self._pipes.values()))

    @property
    def states(self) -> Collection[pb.State]:
        """States of the text processes that are there."""
        return [pipe.state for pipe in tuple(self._pipes.values())]

    def state(self, index: int) -> pb.State | None:
        """Returns how a text process is; None while it has no pipe."""
        pipe = self._pipes.get(index)
        return None if pipe is None or not pipe.is_open else pipe.state

    def connect(self, index: int, welcome: pb.Welcome, on_lost: Callable[[str], None]) -> int:
        """Makes the pipe of a text process; returns the descriptor of the process's end.

        An older pipe of this process is closed.

        Args:
            index: The number of the process.
            welcome: The first message.
            on_lost: Called, from any thread, with the reason for which the pipe has closed.
        """
        ours, theirs = socket.socketpair()
        if index in self._pipes:
            self._pipes[index].close()
        pipe = TextPipe(self, ours, on_lost)
        self._pipes[index] = pipe
        pipe.send(pb.ToText(welcome=welcome))
        pipe.start()
        return theirs.detach()

    def tell(self, message: pb.ToText) -> None:
        """Sends a message to all text processes."""
        for pipe in tuple(self._pipes.values()):
            pipe.send(message)

    def tell_adapters(self, digests: Mapping[str, str]) -> None:
        """Tells all text processes which adapters are loaded now."""
        self.tell(pb.ToText(adapters=adapters_message(digests)))

    def close(self) -> None:
        """Closes all pipes."""
        for pipe in tuple(self._pipes.values()):
            pipe.close()
        self._asking.shutdown(wait=False, cancel_futures=True)

    def ask(self, work: Callable[[], None]) -> None:
        """Does what may take milliseconds apart from the pipes."""
        with suppress(RuntimeError):  # it is closed
            self._asking.submit(work)


class TextPipe:
    """The pipe of one text process; the Outlet of its requests.

    Args:
        hub: All pipes.
        end: Our end.
        on_lost: Called with the reason for which it was closed, if not by `close`.
    """

    def __init__(self, hub: Hub, end: socket.socket, on_lost: Callable[[str], None]) -> None:
        self._hub, self._parts = hub, hub.parts
        self._on_lost = on_lost
        self._lock = threading.Lock()  # of the two mappings, which change together
        self._open: dict[int, _Open] = {}  # by number, until they are left
        self._numbers: dict[str, int] = {}
        self._pipe = Pipe(end, self._take, self._lost, name="text")
        self.is_open = True
        self.state = pb.State()
        """How the process is, as it told last."""

    @property
    def num_under_way(self) -> int:
        """Number of its requests that have not been left."""
        return len(self._open)

    def start(self) -> None:
        """Begins to read and write."""
        self._pipe.start()

    def send(self, message: pb.ToText) -> None:
        """Sends a message; never waits."""
        self._pipe.send(message.SerializeToString)

    def close(self) -> None:
        """Closes the pipe; its requests end."""
        self._pipe.close()
        self._end_all()

    def put(self, items: Sequence[Item]) -> None:
        """Sends what has happened in a turn of the engine; never waits."""
        self._pipe.send(partial(self._written, items))

    def _written(self, items: Sequence[Item]) -> bytes:
        """Returns items as a message."""
        queued, events, failures = [], list[Event](), []
        for request_id, item in items:
            number = self._numbers.get(request_id)
            if number is None:
                continue  # it was left
            if isinstance(item, Event):
                events.append(item)
                if item.finish_reason is not None and number in self._open:
                    self._open[number].ended += 1
            elif isinstance(item, Queued):
                queued.append(number)
            else:
                failures.append(pb.Failure(number=number, error=error_message(item)))
        message = events_message(events, lambda name: self._numbers.get(name, 0))
        message.queued.extend(queued)
        message.failures.extend(failures)
        message.is_crowded = self._parts.num_waiting() > 0
        return pb.ToText(events=message).SerializeToString()

    def _take(self, data: bytes) -> None:
        """Takes in a message; raises whatever is wrong with it."""
        message = pb.ToEngine.FromString(data)
        match message.WhichOneof("kind"):
            case "submit":
                self._submit(message.submit)
            case "leave":
                self._leave(message.leave)
            case "ask":
                self._answer(message.ask)
            case "count":
                self._count(message.count)
            case "state":
                self.state = message.state
            case kind:
                raise CodecError(f"a message of the kind {kind}")

    def _submit(self, message: pb.Submit) -> None:
        request = request_of(message)
        entry = _Open(request)
        with self._lock:
            if message.number in self._open or request.id in self._numbers:
                raise CodecError("a request has the number or the id of another one")
            self._open[message.number] = entry
            self._numbers[request.id] = message.number
        if not message.HasField("form"):
            self._forward(request)
            return
        after = message.form.begins_after if message.form.HasField("begins_after") else None
        grammar = Grammar(message.form.grammar, after)
        # A grammar has its space where it needs one, as `continues` says.
        form = self._parts.compiler.submit(grammar, continues=True, salt=request.salt)
        form.add_done_callback(partial(self._compiled, entry))

    def _compiled(self, entry: _Open, made: "Future[Form]") -> None:
        """Sends a request on whose grammar is compiled; called by the compiler's thread."""
        if entry.is_left:
            return
        request = entry.request
        try:
            self._forward(replace(request, form=made.result()))
        except StructureError as error:  # though the text process has tried it
            self.put([(request.id, InvalidParameter(f"the structure cannot be used: {error}"))])
        except BaseException:
            _log.exception("a grammar could not be compiled")
            failure = EngineFailure("the request failed; see the server's log")
            self.put([(request.id, failure)])

    def _forward(self, request: Request) -> None:
        outlet: Outlet = self
        try:
            self._parts.engine.send(request, outlet)
        except ServingError as error:
            self.put([(request.id, error)])
            return
        if not self.is_open:  # it was lost meanwhile, and its requests were cancelled before
            self._parts.engine.cancel(request.id)

    def _leave(self, message: pb.Leave) -> None:
        entry = self._open.get(message.number)
        if entry is None:
            raise CodecError(f"the request {message.number} is left, which is not there")
        if message.HasField("choice"):
            entry.ended += 1
            self._parts.engine.cancel(entry.request.id, message.choice)
            return
        entry.is_left = True
        with self._lock:
            del self._open[message.number], self._numbers[entry.request.id]
        if entry.ended < entry.request.n:
            self._parts.engine.cancel(entry.request.id)

    def _answer(self, ask: pb.Ask) -> None:
        answer = pb.Answer(number=ask.number)
        match ask.WhichOneof("question"):
            case "room":
                answer.has_room = self._parts.engine.has_room(ask.room.n, ask.room.caller)
                self.send(pb.ToText(answer=answer))
            case "metrics":
                self._hub.ask(partial(self._answer_metrics, answer))
            case "scores":
                prepared = self._parts.prepare_scores()
                prepared.add_done_callback(partial(self._answer_prepared, answer))
            case "drain":
                answer.running = self._hub.num_under_way
                self.send(pb.ToText(answer=answer))
                self._hub.on_drain()
            case kind:
                raise CodecError(f"a question of the kind {kind}")

    def _answer_metrics(self, answer: pb.Answer) -> None:
        answer.metrics = self._parts.metrics.text()
        self.send(pb.ToText(answer=answer))

    def _answer_prepared(self, answer: pb.Answer, prepared: "Future[None]") -> None:
        if prepared.cancelled() or prepared.exception() is not None:
            failure = EngineFailure("logprobs of prompts cannot be computed; see the server's log")
            answer.error.CopyFrom(error_message(failure))
        self.send(pb.ToText(answer=answer))

    def _count(self, count: pb.Count) -> None:
        metrics = self._parts.metrics
        match count.WhichOneof("figure"):
            case "asked":
                asked = count.asked
                has_limit = asked.HasField("max_tokens")
                metrics.asked(asked.n, asked.max_tokens if has_limit else None)
            case "finished":
                metrics.finished(_reason(count.finished.reason), _finished_of(count.finished))
            case "given_up":
                metrics.given_up(_reason(count.given_up.reason), count.given_up.choices)
            case "violated":
                metrics.structure_violated()
            case "of_adapter":
                of = count.of_adapter
                if self._parts.adapters is not None:
                    self._parts.adapters.answered(
                        of.adapter, of.prompt_tokens, of.generation_tokens
                    )
            case kind:
                raise CodecError(f"a figure of the kind {kind}")

    def _lost(self, reason: str) -> None:
        self._end_all()
        self._on_lost(reason)

    def _end_all(self) -> None:
        """Ends all requests; what their callers owe is the ledger's affair."""
        self.is_open = False
        with self._lock:
            ended, self._open = self._open, {}
            self._numbers = {}
        for entry in ended.values():
            entry.is_left = True
            self._parts.engine.cancel(entry.request.id)
        for entry in ended.values():
            if entry.ended < entry.request.n:
                self._parts.metrics.given_up("abort", entry.request.n - entry.ended)


def adapters_message(digests: Mapping[str, str]) -> pb.Adapters:
    """Writes which adapters are loaded."""
    loaded = [pb.AdapterDigest(name=name, digest=digest) for name, digest in digests.items()]
    return pb.Adapters(loaded=loaded)


def _reason(reason: str) -> str:
    if reason not in FINISHED:
        raise CodecError(f"a choice ended with the reason {reason[:20]!r}")
    return reason


def _finished_of(message: pb.Finished) -> Finished:
    return Finished(
        sent=message.sent,
        seated=message.seated,
        first=message.first,
        last=message.last,
        prompt_tokens=message.prompt_tokens,
        tokens=message.tokens,
    )
