"""Health checks of gRPC (grpc.health.v1), which need no key: their number and size are bounded."""

from collections import Counter
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from serving.errors import ServingError
from serving.service.open_calls import REQUEST_SECONDS, counted, first_request, host_of
from serving.service.refusal import abort

MAX_HEALTH_CALLS = 1024
"""Checks and watches of all clients together."""
MAX_CALLS_OF_ADDRESS = 64
"""Those of one address, which the gateways of a machine share."""
_MAX_NAME = 200  # characters of a service's name


class HealthCalls:
    """Bounds the calls of a server's health, of which a watch lives as long as its client.

    A call beyond the bounds ends with UNIMPLEMENTED, at which gRPC's clients send their calls
    without watching (gRFC A17). Any other status would keep a gateway from its service.

    Args:
        request_seconds: Time in which a call's request must have come.
    """

    def __init__(self, request_seconds: float = REQUEST_SECONDS) -> None:
        self._request_seconds = request_seconds
        self._open: Counter[str] = Counter()  # by address

    def bounded(self, handler: Any) -> Any:
        """Returns the handler of Check or Watch with the bounds."""

        async def answer(requests: Any, context: grpc.aio.ServicerContext) -> Any:
            address = host_of(context)
            if (
                self._open.total() >= MAX_HEALTH_CALLS
                or self._open[address] >= MAX_CALLS_OF_ADDRESS
            ):
                await context.abort(
                    grpc.StatusCode.UNIMPLEMENTED, "too many watches of this server's health"
                )
            with counted(self._open, address):
                request = await self._request(requests, context)
                return await (handler.unary_unary or handler.unary_stream)(request, context)

        make = grpc.stream_unary_rpc_method_handler
        if handler.response_streaming:
            make = grpc.stream_stream_rpc_method_handler
        return make(answer, handler.request_deserializer, handler.response_serializer)

    async def _request(
        self, requests: Any, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckRequest:
        try:
            request: health_pb2.HealthCheckRequest = await first_request(
                requests, self._request_seconds
            )
        except ServingError as error:
            await abort(context, error)
        if len(request.service) > _MAX_NAME:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the service's name is too long")
        return request
