"""Calls that come from callers themselves, without the gateway: admitted, marked and charged here.

The gateway has done all of that for the calls that come under its key, so they pass untouched.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

import grpc

from serving.access.caller import Caller
from serving.accounting.admission import Admission
from serving.accounting.answer_tokens import AnswerTokens
from serving.accounting.caller_fields import CallerFields, refuse_caller_fields
from serving.errors import CALLER_METADATA, InvalidRequest, ServingError
from serving.proto import inference_pb2 as pb
from serving.service.bounds import MAX_CALLER_BYTES
from serving.service.open_calls import host_of
from serving.service.refusal import abort

GENERATE = "/mixtral.v1.Inference/Generate"
_COUNTED = (GENERATE, "/mixtral.v1.Inference/Tokenize", "/mixtral.v1.Inference/Detokenize")
# Statuses of errors for which nobody pays who has had no token, as gRPC has them in a context.
_OUR_FAULTS = frozenset(
    number
    for status in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE)
    for number in (status, status.value[0])
)
# The name of the caller of the call that a task answers, where it did not come by a gateway.
_caller: ContextVar[str] = ContextVar("_caller")


def turn_of(context: grpc.aio.ServicerContext) -> str:
    """Returns what a call takes its turns by: its caller's name, or else the gateway's address.

    For whom the gateway asks stands in the metadata of its calls, which is read of no other's.
    """
    caller = _caller.get(None)
    if caller is not None:
        return f"caller {caller}"
    for key, value in context.invocation_metadata() or ():
        if key == CALLER_METADATA and isinstance(value, bytes):
            return f"caller {value[:MAX_CALLER_BYTES].decode('utf-8', 'replace')}"
    return f"address {host_of(context)}"


class DirectCalls:
    """Wraps the handlers of calls that callers send to the service themselves.

    Args:
        admission: Admits the calls and charges them.
        fields: Writes who asks into them.
        max_context: Tokens of prompt and answer together that the model holds.
    """

    def __init__(self, admission: Admission, fields: CallerFields, max_context: int) -> None:
        self._admission = admission
        self._fields = fields
        self._max_context = max_context

    def handler(
        self, method: str, handler: grpc.RpcMethodHandler, caller: Caller
    ) -> grpc.RpcMethodHandler:
        """Returns the handler of a caller's call of that method, such as GENERATE."""
        if method not in _COUNTED:
            return handler
        # A handler that takes a stream of requests begins before the first of them has come, so
        # that a caller beyond its limits is refused before its request is read.
        if method == GENERATE:
            return grpc.stream_stream_rpc_method_handler(
                self._generate(handler.unary_stream, caller),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return grpc.stream_unary_rpc_method_handler(
            self._count(handler.unary_unary, caller),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _generate(self, behaviour: Any, caller: Caller) -> Any:
        """Returns the behaviour of Generate for a caller; `behaviour` is that for the gateway."""

        async def generate(
            requests: AsyncIterator[pb.GenerateRequest], context: grpc.aio.ServicerContext
        ) -> AsyncIterator[pb.GenerateChunk]:
            tokens = AnswerTokens()
            try:
                lease = self._admission.begin(caller)
            except ServingError as error:
                await abort(context, error)
            try:
                request = await _only(requests)
                refuse_caller_fields(request)
                self._fields.write(request, caller)
                lease.reserve([request], self._max_context)
                lease.follow([tokens])
                async with aclosing(behaviour(request, context)) as chunks:
                    async for chunk in chunks:
                        tokens.add(chunk)
                        self._admission.accounts.flush()  # before gRPC has it
                        yield chunk
            except ServingError as error:
                await abort(context, error)
            finally:
                is_lost = not tokens.completion_tokens and context.code() in _OUR_FAULTS
                lease.settle(() if is_lost else [tokens])

        return generate

    def _count(self, behaviour: Any, caller: Caller) -> Any:
        """Returns the behaviour of a call without an answer of the model, which is a request."""

        async def count(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:
            try:
                lease = self._admission.begin(caller)
            except ServingError as error:
                await abort(context, error)
            _caller.set(caller.name)
            try:
                return await behaviour(await _only(requests), context)
            except ServingError as error:
                await abort(context, error)
            finally:
                lease.settle()

        return count


async def _only(requests: AsyncIterator[Any]) -> Any:
    """Returns the one request of a call; raises InvalidRequest if there is none."""
    async for request in requests:
        return request
    raise InvalidRequest("the call has no message; send one request")
