"""The engine as a text process sees it: the worker, the metrics and the adapters behind a pipe.

Everything that the engine's process sends in a turn comes in one message, and wakes the event loop
once.
"""

import asyncio
import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import cast

from google.protobuf.message import DecodeError

from serving.engine.metrics import Finished
from serving.engine.outlet import Item, Outlet, Queued
from serving.engine.submission import LoopOutlet, Submission
from serving.errors import ServingError, Unavailable
from serving.proto import texts_pb2 as pb
from serving.scheduling.request import Request
from serving.texts.codec import CodecError, error_of, events_of, submit_message
from serving.texts.pipe import Buffer, PipeError, framed

_ANSWER_SECONDS = 10.0
_LOST = Unavailable("the model's process was lost; it starts again")
_DRAINING = "the server is shutting down; send the request to another one"


class RemoteEngine(asyncio.Protocol):
    """The pipe's end in a text process: its service's Worker, and an Inlet. Used on one event loop,
    but for `ask` and what is said to be for any thread.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._outlet = LoopOutlet(self, self._loop)
        self._buffer = Buffer()
        self._transport: asyncio.WriteTransport | None = None
        self._next = itertools.count(1)  # numbers of requests and of questions
        self._numbers: dict[str, int] = {}  # of requests that have not been left
        self._ids: dict[int, str] = {}
        self._questions: dict[int, Future[pb.Answer]] = {}
        self._is_crowded = self._is_draining = False
        self._digests: Mapping[str, str] = {}
        self._problem: ServingError | None = None  # why it takes no request any more
        self.welcome: asyncio.Future[pb.Welcome] = self._loop.create_future()
        """The first message."""
        self.leaving = asyncio.Event()
        """Health is to say no."""
        self.ending: asyncio.Future[float] = self._loop.create_future()
        """The seconds in which running answers must end; cancelled when the pipe is lost."""

    @property
    def num_under_way(self) -> int:
        """Number of requests of this process whose iterators have not been left."""
        return self._outlet.num_open

    def digests(self) -> Mapping[str, str]:
        """Returns the digests of the engine's adapters by their names; for any thread."""
        return self._digests

    # A service's Worker.

    async def admits(self, n: int, caller: str) -> bool:
        """Asks the engine only where somebody waits; else there is room for anybody."""
        if not self._is_crowded:
            return True
        answer = await asyncio.wrap_future(self.ask(pb.Ask(room=pb.Room(n=n, caller=caller))))
        return answer.has_room

    def submit(self, request: Request) -> Submission:
        """Returns an iterator of the request's events; see `EngineWorker.submit`."""
        return self._outlet.submit(request)

    def end(self, request_id: str, choice: int) -> None:
        """Computes no more of a choice that has had a token, because its text has ended."""
        self._outlet.end(request_id, choice)

    def drain(self) -> None:
        """Refuses every later request of this process."""
        self._is_draining = True

    async def begin_drain(self) -> int:
        """Asks for the end of the whole service; returns its requests that go on."""
        return (await asyncio.wrap_future(self.ask(pb.Ask(drain=pb.Nothing())))).running

    # An Inlet.

    def send(self, request: Request, outlet: Outlet) -> None:
        """Sends a request to the engine's process; raises Unavailable if that is gone or drains."""
        if self._problem is not None:
            raise self._problem
        if self._is_draining:
            raise Unavailable(_DRAINING)
        number = next(self._next)
        self._write(pb.ToEngine(submit=submit_message(request, number)))
        self._numbers[request.id], self._ids[number] = number, request.id

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Has the engine compute no more of a request, or of one choice of it."""
        number = self._numbers.get(request_id)
        if number is None:
            return
        if choice is None:
            del self._numbers[request_id], self._ids[number]
        self._write(pb.ToEngine(leave=pb.Leave(number=number, choice=choice)))

    # Questions and figures, for any thread.

    def ask(self, question: pb.Ask) -> "Future[pb.Answer]":
        """Asks the engine's process. The future raises the error of its answer, or Unavailable."""
        answer: Future[pb.Answer] = Future()

        def send() -> None:
            if self._problem is not None:
                answer.set_exception(self._problem)
                return
            question.number = next(self._next)
            self._questions[question.number] = answer
            self._write(pb.ToEngine(ask=question))

        self._call(send, answer)
        return answer

    def prepare_scores(self) -> "Future[None]":
        """Begins to compile what logprobs of prompts need; done when that is there."""
        done: Future[None] = Future()

        def pass_on(answer: "Future[pb.Answer]") -> None:
            error = answer.exception()
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(None)

        self.ask(pb.Ask(scores=pb.Nothing())).add_done_callback(pass_on)
        return done

    def count(self, count: pb.Count) -> None:
        """Adds a figure to the metrics of the service."""
        self._call(lambda: self._write(pb.ToEngine(count=count)), None)

    def tell(self, state: pb.State) -> None:
        """Tells how this process is."""
        self._call(lambda: self._write(pb.ToEngine(state=state)), None)

    def _call(self, function: Callable[[], None], answer: "Future[pb.Answer] | None") -> None:
        """Calls a function on the loop; at once where this is the loop's thread."""
        try:
            if asyncio.get_running_loop() is self._loop:
                function()
                return
        except RuntimeError:
            pass
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed: the process ends
            if answer is not None:
                answer.set_exception(_LOST)

    def close(self) -> None:
        """Closes the pipe; for the loop."""
        if self._transport is not None:
            self._transport.close()

    # An asyncio.Protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Notes the way out."""
        # A loop's own transport, such as uvloop's, need not be an instance of asyncio's class.
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        """Takes in messages; what cannot be read ends the pipe."""
        try:
            for message in self._buffer.feed(data):
                self._take(pb.ToText.FromString(message))
        except (PipeError, CodecError, DecodeError):
            assert self._transport is not None
            self._transport.abort()
            raise

    def connection_lost(self, error: Exception | None) -> None:
        """Ends everything that waits for the engine's process."""
        self._problem = _LOST
        for answer in self._questions.values():
            if not answer.done():  # whoever asked may have gone
                answer.set_exception(_LOST)
        self._questions.clear()
        self._outlet.hand_out([(name, _LOST) for name in self._numbers])
        if not self.welcome.done():
            self.welcome.set_exception(_LOST)
        self.ending.cancel()

    def _write(self, message: pb.ToEngine) -> None:
        if self._transport is not None and self._problem is None:
            self._transport.write(framed(message.SerializeToString()))

    def _take(self, message: pb.ToText) -> None:
        match message.WhichOneof("kind"):
            case "events":
                self._hand_out(message.events)
            case "answer":
                self._answer(message.answer)
            case "adapters":
                self._digests = _digests_of(message.adapters)
            case "welcome":
                self._digests = _digests_of(message.welcome.adapters)
                self.welcome.set_result(message.welcome)
            case "leaving":
                self.leaving.set()
            case "ending":
                if not self.ending.done():
                    self.ending.set_result(message.ending.seconds)
            case kind:
                raise CodecError(f"a message of the kind {kind}")

    def _hand_out(self, message: pb.Events) -> None:
        self._is_crowded = message.is_crowded
        ids = self._ids
        items: list[Item] = [(ids.get(number, ""), Queued.QUEUED) for number in message.queued]
        for number, event in events_of(message, lambda number: ids.get(number, "")):
            items.append((ids.get(number, ""), event))
        for failure in message.failures:
            items.append((ids.get(failure.number, ""), error_of(failure.error)))
        self._outlet.hand_out(items)  # those of requests that were left meanwhile reach nobody

    def _answer(self, answer: pb.Answer) -> None:
        question = self._questions.pop(answer.number, None)
        if question is None:
            return
        with suppress(Exception):  # whoever asked may have gone
            if answer.HasField("error"):
                question.set_exception(error_of(answer.error))
            else:
                question.set_result(answer)


class RemoteCounts:
    """The metrics of the service, which the engine's process has; for any thread.

    Args:
        engine: The way there.
    """

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine = engine

    def asked(self, n: int, max_tokens: int | None) -> None:
        """Records what a request asks for."""
        self._engine.count(pb.Count(asked=pb.Asked(n=n, max_tokens=max_tokens)))

    def finished(self, reason: str, choice: Finished) -> None:
        """Records a choice that ended with the reason `stop` or `length`."""
        figure = pb.Finished(
            reason=reason,
            sent=choice.sent,
            seated=choice.seated,
            first=choice.first,
            last=choice.last,
            prompt_tokens=choice.prompt_tokens,
            tokens=choice.tokens,
        )
        self._engine.count(pb.Count(finished=figure))

    def given_up(self, reason: str, choices: int) -> None:
        """Records choices of one request that ended with the reason `abort` or `error`."""
        if choices:
            self._engine.count(pb.Count(given_up=pb.GivenUp(reason=reason, choices=choices)))

    def structure_violated(self) -> None:
        """Records a choice that misses a part of its schema that is not enforced."""
        self._engine.count(pb.Count(violated=pb.Nothing()))

    def answered(self, adapter: str, prompt_tokens: int, generation_tokens: int) -> None:
        """Counts a request for an adapter that is over."""
        figure = pb.OfAdapter(
            adapter=adapter, prompt_tokens=prompt_tokens, generation_tokens=generation_tokens
        )
        self._engine.count(pb.Count(of_adapter=figure))

    def text(self) -> bytes:
        """Asks for all metrics of the service; not to be called on the event loop.

        Raises Unavailable if the engine's process does not answer.
        """
        asked = self._engine.ask(pb.Ask(metrics=pb.Nothing()))
        try:
            return asked.result(_ANSWER_SECONDS).metrics
        except TimeoutError:
            raise Unavailable("the model's process does not tell its metrics") from None


def _digests_of(message: pb.Adapters) -> Mapping[str, str]:
    return {adapter.name: adapter.digest for adapter in message.loaded}
