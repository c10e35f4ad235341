"""Interceptor: admits or refuses calls of every gRPC method except health checks.

serving/access decides. Keys and tokens are in the metadata under the names that HTTP's headers
have. A refused call ends with the error that `Access.admit` raised.

Behind it every call of Generate says who asks, in the proto's own fields: the gateway has written
them into its calls, and direct_calls.py writes them into all others.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection

import grpc
from grpc_health.v1 import health

from serving.access.caller import GATEWAY
from serving.access.credentials import Access
from serving.errors import Forbidden, ServingError
from serving.service.call_log import LoggedDetails
from serving.service.direct_calls import DirectCalls
from serving.service.refusal import abort


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Admits calls by their key or token.

    Args:
        access: Decides.
        operators_only: Methods such as "/mixtral.v1.Inference/Drain", for operators alone.
        direct_calls: Admits and charges the calls of all callers but the gateway.
    """

    def __init__(
        self,
        access: Access,
        operators_only: Collection[str] = (),
        *,
        direct_calls: DirectCalls,
    ) -> None:
        self._access = access
        self._operators_only = frozenset(operators_only)
        self._direct_calls = direct_calls

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Returns the method's handler, or one that refuses the call."""
        handler = await continuation(details)
        if handler is None or details.method.startswith(f"/{health.SERVICE_NAME}/"):
            return handler
        metadata = {key: str(value) for key, value in details.invocation_metadata or ()}
        try:
            caller = await self._access.admit(metadata)
            if isinstance(details, LoggedDetails):
                details.line.caller = caller.name
            if details.method in self._operators_only and not caller.is_operator:
                raise Forbidden(f"{details.method} is for the operators' keys")
        except ServingError as error:
            return _refusal(handler, error)
        if caller.name == GATEWAY:
            return handler
        return self._direct_calls.handler(details.method, handler, caller)


def _refusal(handler: grpc.RpcMethodHandler, error: ServingError) -> grpc.RpcMethodHandler:
    """Returns a handler that ends every call with that error, before a message of it is read."""

    async def refuse(requests: object, context: grpc.aio.ServicerContext) -> None:
        await abort(context, error)

    async def refuse_stream(
        requests: object, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[None]:
        await refuse(requests, context)
        yield

    # A handler that takes a stream of requests begins before the first of them has come.
    if handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse_stream)
    return grpc.stream_unary_rpc_method_handler(refuse)
