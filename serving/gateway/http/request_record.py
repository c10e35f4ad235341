"""One request and its answer, from the first byte in to the last byte out.

What is to be known about it is gathered here while it happens: its caller, its calls of the model
service and their tokens, when its answer began and how it ended. serving/gateway/journal.py makes
one for each request and tells of it when it is over.
"""

import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Scope

from serving.accounting.accounts import Accounts
from serving.accounting.answer_tokens import Tally
from serving.gateway.upstream import Answer, ModelService
from serving.observe.tracing import CLIENT, Span
from serving.proto import inference_pb2

_STATE = "exchange"  # its name in the request's state
_CLIENTS_ID = re.compile(r"[\x21-\x7e]{1,100}")  # that is given back to a client of Azure's
_LONGEST_NAME = 200  # of a model; clients ask for what they like


@dataclass(frozen=True)
class Call:
    """One question to the model service."""

    model: str  # the served one
    message: inference_pb2.GenerateRequest
    tally: Tally
    span: Span


class Exchange:
    """See above. `of` finds the one that a request belongs to.

    Args:
        scope: ASGI's, of the request.
        accounts: Where the caller is admitted.
        span: Of the request, which ends with it.
        server: Attributes that name the model service in spans.
        keeps_texts: Whether the texts of answers are kept until it is over.
        clock: The time, as time.monotonic() tells it.
    """

    def __init__(
        self,
        scope: Scope,
        accounts: Accounts,
        span: Span,
        server: dict[str, str | int],
        *,
        keeps_texts: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.span = span
        self.calls: list[Call] = []
        self.status: int | None = None
        self.error: str | None = None  # Azure's code of the error that it ended with
        self.reason: str | None = None  # why it broke off
        self.is_stream = False
        self.is_whole = False  # whether all of the answer was sent
        self.started = clock()
        self.first_byte: float | None = None  # seconds after the start
        self._scope = scope
        self._accounts = accounts
        self._server = server
        self._keeps_texts = keeps_texts
        self._clock = clock
        scope.setdefault("state", {})[_STATE] = self

    @classmethod
    def of(cls, request: Request) -> "Exchange":
        """The one that a request belongs to."""
        exchange: Exchange = getattr(request.state, _STATE)
        return exchange

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return self._clock() - self.started

    @property
    def first_token(self) -> float | None:
        """Seconds from the start to the service's first chunk; None if there was none."""
        times = [call.tally.first_at for call in self.calls if call.tally.first_at is not None]
        return min(times) - self.started if times else None

    @property
    def prompt_tokens(self) -> int:
        """Of all its calls, as far as they are known."""
        return sum(call.tally.prompt_tokens for call in self.calls)

    @property
    def completion_tokens(self) -> int:
        """Of all its calls, so far."""
        return sum(call.tally.completion_tokens for call in self.calls)

    @property
    def caller(self) -> str | None:
        """The name of who asks; None if nobody was let in."""
        caller = self._scope["state"].get("caller")
        return None if caller is None else str(caller.name)

    @property
    def route(self) -> str | None:
        """The path of the route that answers, as the application wrote it; None if there is none.

        In it a deployment's name, say, is still {name}.
        """
        route = self._scope.get("route")
        return None if route is None else str(route.path)

    def ask(
        self,
        service: ModelService,
        message: inference_pb2.GenerateRequest,
        *,
        operation: str,
        asked: str | None,
        model: str,
    ) -> Answer:
        """Asks the model service on the caller's account; the answer must be cancelled in the end.

        Args:
            service: The model service.
            message: What it is asked.
            operation: "chat" or "text_completion", as OpenTelemetry names them.
            asked: The model that the client asked for.
            model: The one that is served.

        Raises:
            Overloaded: The caller has used up its minute.
        """
        caller = self.caller
        if caller is not None and not self.calls:  # several prompts are one request
            self._accounts.admit(caller)
        asked = (asked or model)[:_LONGEST_NAME]
        span = self.span.child(f"{operation} {asked}", kind=CLIENT)
        if span.is_recording:
            span.set(self._server | _attributes(operation, asked, message))
        metadata = (("x-request-id", self.id), *span.carrier())
        answer = service.generate(message, metadata)
        if self._keeps_texts:
            answer.tally.texts = {}
        self.calls.append(Call(model, message, answer.tally, span))
        return answer

    def note(self, message: Message) -> None:
        """Notes what is about to be sent, and gives the answer the exchange's id."""
        if message["type"] == "http.response.start":
            self._note_start(message)
        elif message["type"] == "http.response.body":
            if self.first_byte is None and message.get("body"):
                self.first_byte = self._clock() - self.started
            self.is_whole = not message.get("more_body", False)

    def _note_start(self, message: Message) -> None:
        self.status = message["status"]
        headers = MutableHeaders(scope=message)
        headers["x-request-id"] = self.id
        theirs = headers_of(self._scope).get("x-ms-client-request-id", "")
        if _CLIENTS_ID.fullmatch(theirs):
            headers["x-ms-client-request-id"] = theirs
        self.error = headers.get("x-ms-error-code")
        self.is_stream = headers.get("content-type", "").startswith("text/event-stream")


def headers_of(scope: Scope) -> Headers:
    """The headers of a request, by names in lower case."""
    return Headers(scope=scope)


def prompt_of(message: inference_pb2.GenerateRequest) -> str | list[Any]:
    """What was asked, for a log that is to show it: a text, token ids, or [role, text] pairs."""
    match message.WhichOneof("prompt"):
        case "chat":
            return [[each.role, each.content] for each in message.chat.messages]
        case "text":
            return message.text
        case _:
            return list(message.token_ids.ids)


def _attributes(
    operation: str, asked: str, message: inference_pb2.GenerateRequest
) -> dict[str, str | int | float | bool | Sequence[str]]:
    """Of a span, by OpenTelemetry's conventions for generative AI. Stop texts are texts: left out.

    https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
    """
    found: dict[str, str | int | float | bool | Sequence[str]] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "mixtral_jax",
        "gen_ai.output.type": "text",
        "gen_ai.request.model": asked,
    }
    if message.HasField("max_tokens"):
        found["gen_ai.request.max_tokens"] = message.max_tokens
    if message.n > 1:
        found["gen_ai.request.choice.count"] = message.n
    sampling = message.sampling
    for name in ("temperature", "top_p", "seed"):
        if sampling.HasField(name):
            found[f"gen_ai.request.{name}"] = _short(getattr(sampling, name))
    for name in ("top_k", "presence_penalty", "frequency_penalty"):
        if value := getattr(sampling, name):
            found[f"gen_ai.request.{name}"] = _short(value)
    return found


def _short(value: float) -> float:
    """A float of the wire as the client wrote it: 0.7, where the wire's is 0.699999988."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
