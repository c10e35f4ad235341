"""Who may call the service, for every method of gRPC but health checks: serving/access.py decides.

Keys and tokens stand in the metadata under the names that the headers of HTTP have. A refused call
ends as the error that `Access.admit` raised.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection

import grpc
from grpc_health.v1 import health

from serving.access.credentials import Access
from serving.access.keyring import DEFAULT, GATEWAY
from serving.errors import ERROR_METADATA, Forbidden, ServingError


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Lets calls in.

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
    """A handler of the same kind that ends every call with that error."""

    async def one(request: object, context: grpc.aio.ServicerContext) -> None:
        await context.abort(
            grpc.StatusCode[error.grpc_status],
            str(error),
            ((ERROR_METADATA, type(error).__name__),),
        )

    async def many(request: object, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        await one(request, context)
        yield

    kinds = {
        (False, False): (grpc.unary_unary_rpc_method_handler, one),
        (False, True): (grpc.unary_stream_rpc_method_handler, many),
        (True, False): (grpc.stream_unary_rpc_method_handler, one),
        (True, True): (grpc.stream_stream_rpc_method_handler, many),
    }
    make, behaviour = kinds[bool(handler.request_streaming), bool(handler.response_streaming)]
    return make(
        behaviour,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
