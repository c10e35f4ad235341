"""The way of a request that the model answers: read, admitted, asked, answered.

A client that drops cancels its call to the service, at every moment of its request.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from serving.access.caller import Caller
from serving.accounting.admission import OUR_FAULTS, Admission, Lease
from serving.accounting.caller_fields import CallerFields
from serving.errors import InvalidRequest
from serving.gateway.dialect import parsing
from serving.gateway.dialect.anthropic.request import MessagesRequest
from serving.gateway.dialect.anthropic.response import MessagesAnswer
from serving.gateway.dialect.anthropic.stream import MessagesEvents
from serving.gateway.dialect.chat.request import ChatRequest
from serving.gateway.dialect.chat.response import ChatAnswer
from serving.gateway.dialect.chat.stream import ChatEvents
from serving.gateway.dialect.chunks import Identity
from serving.gateway.dialect.fields import Parameters
from serving.gateway.dialect.openai import is_openai_path
from serving.gateway.dialect.prompt_size import check_prompts
from serving.gateway.dialect.responses.request import ResponsesRequest
from serving.gateway.dialect.responses.response import ResponsesAnswer
from serving.gateway.dialect.responses.stream import ResponsesEvents
from serving.gateway.dialect.text.request import CompletionRequest
from serving.gateway.dialect.text.response import TextAnswer
from serving.gateway.dialect.text.stream import TextEvents
from serving.gateway.dialect.whole import check_logprobs
from serving.gateway.dialect.writers import EventWriter, WholeWriter
from serving.gateway.event_stream import DisconnectWatch, EventStream
from serving.gateway.http import body
from serving.gateway.http.body_room import ROOM, BodyRoom, Hold
from serving.gateway.http.failures import LIMIT_HEADERS
from serving.gateway.http.request_record import RequestRecord
from serving.gateway.joined_answers import RunningAnswer, num_under_way
from serving.gateway.upstream import ModelService
from serving.gateway.whole_response import WholeResponse
from serving.proto import inference_pb2

Asked = TypeVar("Asked", bound=Parameters)
# The header of an answer that names the parts of schemas that were enforced in a weaker form, and
# the most characters of it.
WEAKENED_HEADER = "x-mixtral-weakened"
MAX_WEAKENED = 1024
# The header of an answer at once that misses such a part, which says how; as long at most.
VIOLATION_HEADER = "x-mixtral-violation"


@dataclass(frozen=True)
class Limits:
    """Limits of the gateway.

    Attributes:
        heartbeat_seconds: A stream that is silent for so long sends a heartbeat.
        body_bytes: The longest body of a request.
        body_seconds: The longest time that a body may take to arrive.
        body_room: The bytes of all large bodies.
    """

    heartbeat_seconds: float = 15.0
    body_bytes: int = body.LIMIT
    body_seconds: float = body.SECONDS
    body_room: int = ROOM


@dataclass(frozen=True)
class Kind(Generic[Asked]):
    """A kind of request, and how it is read and answered.

    Attributes:
        operation: Its name in OpenTelemetry's conventions for generative AI.
        request: The type of its body.
        whole: Makes what writes the answer to a request at once.
        events: Makes what writes it as a stream.
    """

    operation: str
    request: type[Asked]
    whole: Callable[[Identity, Asked], WholeWriter]
    events: Callable[[Identity, Asked], EventWriter]


CHAT = Kind(
    "chat",
    ChatRequest,
    lambda identity, asked: ChatAnswer(identity, asked.prompt_logprobs),
    lambda identity, asked: ChatEvents(identity, asked.stream_usage),
)
TEXT = Kind(
    "text_completion",
    CompletionRequest,
    lambda identity, asked: TextAnswer(identity, asked.repeated()),
    lambda identity, asked: TextEvents(identity, asked.stream_usage, asked.repeated()),
)
RESPONSES = Kind(
    "chat",
    ResponsesRequest,
    lambda identity, asked: ResponsesAnswer(identity, asked.repeated()),
    lambda identity, asked: ResponsesEvents(identity, asked.repeated()),
)
MESSAGES = Kind(
    "chat",
    MessagesRequest,
    lambda identity, asked: MessagesAnswer(identity, asked.max_tokens),
    lambda identity, asked: MessagesEvents(identity, asked.max_tokens),
)


class Gateway:
    """Answers requests by the model service.

    Args:
        service: The model service.
        admission: Admits requests within the limits of their callers.
        fields: Writes into calls who asks.
        limits: Limits of the gateway itself.

    Attributes:
        service: The same.
        bodies: The room for large bodies that callers share.
    """

    def __init__(
        self, service: ModelService, admission: Admission, fields: CallerFields, limits: Limits
    ) -> None:
        self.service = service
        self._admission = admission
        self._fields = fields
        self._limits = limits
        self.bodies = BodyRoom(limits.body_room)

    async def answer(
        self,
        request: Request,
        kind: Kind[Asked],
        unknown: parsing.UnknownFields,
        id_prefix: str = "",
        *,
        tells_cached: bool = False,
    ) -> Response:
        """Returns the answer to a request, at once or as a stream.

        Args:
            request: A request whose `state.caller` is known.
            kind: The kind of request that its path is for.
            unknown: The vendor's rule for fields that its API does not have.
            id_prefix: The vendor's beginning of an answer's id; the request's id follows.
            tells_cached: Whether the vendor's usage tells the cached tokens of a prompt.

        Raises:
            ServingError: The request is refused, or failed before the first token.
            ClientDisconnect: The client has gone away.
        """
        record = RequestRecord.of(request)
        caller: Caller = request.state.caller
        limit_headers = partial(self._admission.headers, caller)
        setattr(request.state, LIMIT_HEADERS, limit_headers)
        lease = self._admission.begin(caller)
        hold = self.bodies.hold(caller.name)
        asked: Asked | None = None
        try:
            asked = await self._read(request, kind, unknown, hold)
            asked.ask_deployment(request.path_params.get("name"))
            model = await self.service.model()
            calls = asked.protos()
            asked.fill_in(calls, model.sampling_defaults)
            check_prompts(calls, model)
            if not asked.stream:
                check_logprobs(calls)
            for call in calls:
                self._fields.write(call, caller, asked.cache_salt, asked.scheduling_priority)
            limit = self._admission.requests_at_a_time(caller)
            at_a_time = num_under_way(len(calls), asked.choices, limit)
            lease.reserve(calls, model.max_context, at_a_time)
            answer = self.service.ask(
                calls, record, kind.operation, asked.model, model.name, asked.complete, at_a_time
            )
            lease.follow(answer.tokens)
            identity = Identity.new(
                model.name,
                id_prefix + record.id,
                tells_cached=tells_cached,
                is_openai=is_openai_path(request.url.path),
            )
            response = await self._send(request, kind, asked, identity, answer, lease, hold)
        except BaseException as error:
            lease.settle()  # unless it has been settled
            if asked is not None and isinstance(error, InvalidRequest):
                raise asked.as_sent(error) from error
            raise
        finally:
            hold.free()
        response.headers.update(limit_headers())
        if answer.weakened:
            response.headers[WEAKENED_HEADER] = answer.weakened[:MAX_WEAKENED]
        return response

    async def _read(
        self, request: Request, kind: Kind[Asked], unknown: parsing.UnknownFields, hold: Hold
    ) -> Asked:
        """Returns what is asked. The bytes of the body, which may be many more, are not kept."""
        limits = self._limits
        content = await body.read_body(request, hold, limits.body_bytes, limits.body_seconds)
        return parsing.read(content, kind.request, unknown)

    async def _send(
        self,
        request: Request,
        kind: Kind[Asked],
        asked: Asked,
        identity: Identity,
        answer: RunningAnswer,
        lease: Lease,
        hold: Hold,
    ) -> Response:
        """Returns the response that reads the answer, and settles the lease when it has ended.

        The room of the body is given back when the prompts have been queued.
        """
        watch = DisconnectWatch(request, answer)

        def end() -> None:
            watch.end()
            lease.settle(answer.tokens)

        try:
            chunks = await _begun(answer)
            hold.free()
            adapters = (tokens.adapter for tokens in answer.tokens if tokens.adapter is not None)
            identity = identity.answered_by(next(adapters, None), asked.model)
            if asked.returns_ids:
                identity = identity.telling_ids(chunks)
            if asked.stream and not watch.client_disconnected:
                events = kind.events(identity, asked)
                prompts = sum(tokens.prompt_tokens for tokens in answer.tokens)
                opening = events.opening(asked.choices * len(answer.tokens), prompts)
                opening += events.write(chunks)
                seconds = self._limits.heartbeat_seconds
                return EventStream(events, answer, opening, seconds, watch, end)
            whole = kind.whole(identity, asked)
            violations: list[str] = []
            while chunks:
                whole.add(chunks)
                violations += (chunk.violation for chunk in chunks if chunk.violation)
                chunks = await answer.read_all()
        except BaseException as error:
            if isinstance(error, OUR_FAULTS) and not watch.client_disconnected:
                lease.settle()  # nobody pays for an answer that the server has lost
            end()
            if watch.client_disconnected:
                raise ClientDisconnect from None
            raise
        end()
        if watch.client_disconnected:
            raise ClientDisconnect
        response = WholeResponse(whole)
        if violations:
            text = re.sub(r"[^ -~]", "?", "; ".join(violations))
            response.headers[VIOLATION_HEADER] = text[:MAX_WEAKENED]
        return response


async def _begun(answer: RunningAnswer) -> list[inference_pb2.GenerateChunk]:
    """Returns the first chunks of an answer, whose first prompts have been rendered and queued.

    Raises:
        ServingError: A prompt was refused; the answer to the client can still be an error.
    """
    chunks = await answer.read_all()
    while not answer.has_begun:
        if not (more := await answer.read_all()):
            break
        chunks += more
    return chunks
