"""Interceptor: admits or refuses calls of every gRPC method except health checks.

serving/access decides. Keys and tokens are in the metadata under the names that HTTP's headers
have. A refused call ends with the error that `Access.admit` raised.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection

import grpc
from grpc_health.v1 import health

from serving.access.credentials import Access
from serving.access.keyring import DEFAULT, GATEWAY
from serving.errors import ERROR_METADATA, Forbidden, ServingError


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Admits calls by their key or token.

    Args:
        access: Decides.
        operators_only: Methods such as "/mixtral.v1.Inference/Drain", for the callers "default" and
            "gateway" alone, whose keys the operator set.
    """

    def __init__(self, access: Access, operators_only: Collection[str] = ()) -> None:
        self._access = access
        self._operators_only = frozenset(operators_only)

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
            if details.method in self._operators_only and caller.name not in (DEFAULT, GATEWAY):
                raise Forbidden(f"{details.method} is for the operator's own key")
        except ServingError as error:
            return _refusal(handler, error)
        return handler


def _refusal(handler: grpc.RpcMethodHandler, error: ServingError) -> grpc.RpcMethodHandler:
    """Returns a handler of the same kind that ends every call with that error."""

    async def refuse(request: object, context: grpc.aio.ServicerContext) -> None:
        await context.abort(
            grpc.StatusCode[error.grpc_status],
            str(error),
            ((ERROR_METADATA, type(error).__name__),),
        )

    async def refuse_stream(
        request: object, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[None]:
        await refuse(request, context)
        yield

    kinds = {
        (False, False): (grpc.unary_unary_rpc_method_handler, refuse),
        (False, True): (grpc.unary_stream_rpc_method_handler, refuse_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, refuse),
        (True, True): (grpc.stream_stream_rpc_method_handler, refuse_stream),
    }
    make, behaviour = kinds[bool(handler.request_streaming), bool(handler.response_streaming)]
    return make(
        behaviour,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
