"""The record of one HTTP request, from the first byte in to the last byte out.

It is written while the request runs, and read once by the access log when it is over. A record
records: it admits nobody and calls nothing.
"""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Scope

from serving.accounting.answer_tokens import AnswerTokens
from serving.gateway.dialect.anthropic.error import (
    REQUEST_ID_HEADER,
    REQUEST_ID_PREFIX,
    is_anthropic_path,
)
from serving.observe.tracing import Span
from serving.proto import inference_pb2

CLIENT_CLOSED_REQUEST = 499  # nginx's status for it, which no client reads
_STATE = "record"  # its name in the request's state
_MAX_ADDRESS_LENGTH = 64  # a proxy may pass on what its client has written


@dataclass(frozen=True)
class ModelCall:
    """A call of the model service that belongs to a request.

    Attributes:
        model: The served name of the model.
        message: The call.
        tokens: The counts of its answer, which grow while it runs.
        span: The span of the call.
    """

    model: str
    message: inference_pb2.GenerateRequest
    tokens: AnswerTokens
    span: Span

    @property
    def answered_by(self) -> str:
        """The name of the adapter that answers, or else of the model."""
        return self.tokens.adapter or self.model


class RequestRecord:
    """Everything known about one HTTP request. `of` finds the record of a request.

    Args:
        scope: The request in ASGI's form.
        span: The span of the request.
        keeps_texts: Whether the texts of its answers are kept for the log.
        clock: Returns seconds, like time.monotonic.

    Attributes:
        id: 32 hexadecimal digits, which the answer carries too.
        calls: Its calls of the model service.
        status: The HTTP status; None until it is known.
        error: Azure's code of the error that it ended with.
        reason: Why an answer broke off.
        is_stream: Whether the answer is a stream of events.
        is_whole: Whether all of the answer was sent.
        started: The clock when the request began.
        first_byte: Seconds from the start to the first byte of the answer's body.
    """

    def __init__(
        self,
        scope: Scope,
        span: Span,
        *,
        keeps_texts: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.span = span
        self.keeps_texts = keeps_texts
        self.calls: list[ModelCall] = []
        self.status: int | None = None
        self.error: str | None = None
        self.reason: str | None = None
        self.is_stream = False
        self.is_whole = False
        self.started = clock()
        self.first_byte: float | None = None
        self._scope = scope
        self._clock = clock
        scope.setdefault("state", {})[_STATE] = self

    @classmethod
    def of(cls, request: Request) -> "RequestRecord":
        """Returns the record of a request."""
        record: RequestRecord = getattr(request.state, _STATE)
        return record

    @staticmethod
    def id_in(scope: Scope) -> str | None:
        """Returns the id of a request in ASGI's form; None where it has no record yet."""
        record: RequestRecord | None = scope.get("state", {}).get(_STATE)
        return None if record is None else record.id

    @property
    def seconds(self) -> float:
        """Seconds since the request began."""
        return self._clock() - self.started

    @property
    def first_token(self) -> float | None:
        """Seconds from the start to the service's first chunk; None if there was none."""
        times = [call.tokens.first_at for call in self.calls if call.tokens.first_at is not None]
        return min(times) - self.started if times else None

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all its calls, as far as they are known."""
        return sum(call.tokens.prompt_tokens for call in self.calls)

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far by all its calls."""
        return sum(call.tokens.completion_tokens for call in self.calls)

    @property
    def caller(self) -> str | None:
        """The caller's name; None if nobody was let in."""
        caller = self._scope["state"].get("caller")
        return None if caller is None else str(caller.name)

    @property
    def client(self) -> str | None:
        """The client's address: the connection's, or the one that a trusted proxy names."""
        address = self._scope.get("client")
        return None if address is None else str(address[0])[:_MAX_ADDRESS_LENGTH]

    @property
    def route(self) -> str | None:
        """The path of the route as the application wrote it, such as `/v1/models/{model_id}`.

        None if no route has this path.
        """
        route = self._scope.get("route")
        return None if route is None else str(route.path)

    def note(self, message: Message) -> None:
        """Records an ASGI message of the answer that is about to be sent."""
        if message["type"] == "http.response.start":
            headers = Headers(raw=message["headers"])
            self.status = message["status"]
            self.error = headers.get("x-ms-error-code")
            self.is_stream = headers.get("content-type", "").startswith("text/event-stream")
        elif message["type"] == "http.response.body":
            if self.first_byte is None and message.get("body"):
                self.first_byte = self._clock() - self.started
            self.is_whole = not message.get("more_body", False)


def add_request_id(headers: MutableHeaders, path: str, request_id: str) -> None:
    """Adds a request's id to the headers of its answer, under the names that its clients know."""
    headers["x-request-id"] = request_id
    if is_anthropic_path(path):
        headers[REQUEST_ID_HEADER] = REQUEST_ID_PREFIX + request_id


def prompt_of(message: inference_pb2.GenerateRequest) -> str | list[Any]:
    """Returns the prompt of a call for a log: a text, token ids, or [role, text] pairs."""
    match message.WhichOneof("prompt"):
        case "chat":
            return [[turn.role, turn.content] for turn in message.chat.messages]
        case "text":
            return message.text
        case _:
            return list(message.token_ids.ids)
