"""Reading of a request's body. A body that is no JSON, too large or too slow is refused early.

The rest of a refused body is still read for a while (`Lingering`). If the connection were closed at
once, it would be reset, and the client would see that instead of the reason.
"""

import asyncio
from contextlib import suppress

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from serving.errors import DeadlineExceeded, RequestTooLarge, UnsupportedMedia
from serving.gateway.http.body_room import SMALL, Hold

LIMIT = 4 * 2**20
SECONDS = 30.0
# A refused client may go on sending, up to these bytes, and not for longer.
_LINGER_BYTES = 8 * 2**20
_LINGER_SECONDS = 1.0


class BodyTooSlow(DeadlineExceeded):
    """The body has not arrived in time, and its rest will not be waited for."""


async def read_body(
    request: Request, hold: Hold, limit: int = LIMIT, seconds: float = SECONDS
) -> bytes:
    """Returns the whole body.

    Args:
        request: The request, of which nothing has been read.
        hold: Takes room for a body that is not small when its first bytes have come; while it
            waits for room, what its client sends stays in the network.
        limit: The bytes that a body may have.
        seconds: The time that it may take to arrive, with the time that it waits.

    Raises:
        UnsupportedMedia: The headers say that it is not JSON, or is compressed.
        RequestTooLarge: It has more bytes than `limit`.
        Overloaded: Too many large bodies of the caller wait already.
        BodyTooSlow: It took longer than `seconds`.
    """
    _check_type(request)
    too_large = RequestTooLarge(f"the body is larger than {limit:,} bytes; send a smaller one")
    size = int(request.headers.get("content-length", limit))
    if size > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
                if len(body) > SMALL and not hold.has_room:
                    await hold.take(size)
    except TimeoutError:
        raise BodyTooSlow(f"the body did not arrive within {seconds:g} seconds") from None
    return bytes(body)


def _check_type(request: Request) -> None:
    named = request.headers.get("content-type", "application/json")
    kind = named.partition(";")[0].strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        raise UnsupportedMedia(
            f"the body is of type '{kind[:100]}'; send JSON with the header "
            "'Content-Type: application/json'"
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMedia("the body is compressed; send it without a Content-Encoding")


class Lingering(JSONResponse):
    """An answer after which the connection closes, when the client has had time to read it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers["connection"] = "close"
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        remaining = _LINGER_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                while remaining > 0:
                    message = await receive()
                    remaining -= len(message.get("body", b""))
                    if not message.get("more_body"):
                        break
        await send({"type": "http.response.body", "body": b"", "more_body": False})
