"""GET /metrics on the port of the API: the figures of the gateway and of a model service.

With several services it shows those of whichever gRPC chooses: scrape the port of each instead.
"""

import asyncio
import re
from collections.abc import Iterator

from fastapi import Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from serving.access.caller import Caller
from serving.errors import Forbidden, ServingError
from serving.gateway.http.metrics import GatewayMetrics
from serving.gateway.upstream import ModelService

# A family begins with its help: "# HELP NAME TEXT".
_FAMILY = re.compile(rb"^(?=# HELP )", re.MULTILINE)


async def report_metrics(request: Request) -> Response:
    """Returns the figures to an operator.

    Raises:
        Forbidden: The key is no operator's.
    """
    caller: Caller = request.state.caller
    if not caller.is_operator:
        raise Forbidden("the metrics are for operators' keys")
    return await show_metrics(request)


async def show_metrics(request: Request) -> Response:
    """Returns the figures of the gateway, and those of a service if one answers."""
    metrics: GatewayMetrics = request.app.state.metrics
    service: ModelService = request.app.state.gateway.service
    own = await asyncio.to_thread(metrics.report)
    try:
        theirs = await service.metrics()
    except ServingError:
        theirs = b""  # the figures of the gateway show that it is gone
    text = own + b"".join(_others(own, theirs))
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def _others(own: bytes, theirs: bytes) -> Iterator[bytes]:
    """Yields the families of `theirs` that `own` does not have: a name may stand there once."""
    names = {_name(family) for family in _FAMILY.split(own)}
    for family in _FAMILY.split(theirs):
        if family and _name(family) not in names:
            yield family


def _name(family: bytes) -> bytes:
    return family.split(b" ", 3)[2] if family.startswith(b"# HELP ") else b""
