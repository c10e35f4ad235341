"""Health checks of gRPC (grpc.health.v1), which need no key: their number and size are bounded."""

from collections import Counter
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

MAX_WATCHES = 1024
"""Watches of all clients together."""
_MAX_WATCHES_OF_ADDRESS = 64  # gateways of one machine share an address
_MAX_NAME = 200  # characters of a service's name


class HealthChecks(health.aio.HealthServicer):  # type: ignore[name-defined]
    """Tells the health of the server to whoever asks.

    A client holds a watch for as long as it lives, so that their number is limited, for each
    address too. A watch beyond that ends with UNIMPLEMENTED, at which gRPC's clients send their
    calls without watching (gRFC A17); any other status would keep a gateway from its service.
    """

    def __init__(self) -> None:
        super().__init__()
        self._watches: Counter[str] = Counter()  # by address

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> Any:
        """Returns the health of a service by its name."""
        await _check_name(request, context)
        return await super().Check(request, context)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Streams the health of a service whenever it changes."""
        await _check_name(request, context)
        address = (context.peer() or "").rpartition(":")[0]
        if (
            self._watches.total() >= MAX_WATCHES
            or self._watches[address] >= _MAX_WATCHES_OF_ADDRESS
        ):
            await context.abort(
                grpc.StatusCode.UNIMPLEMENTED, "too many watches of this server's health"
            )
        self._watches[address] += 1
        try:
            await super().Watch(request, context)
        finally:
            self._watches[address] -= 1
            if not self._watches[address]:
                del self._watches[address]


async def _check_name(
    request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
) -> None:
    if len(request.service) > _MAX_NAME:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the service's name is too long")
