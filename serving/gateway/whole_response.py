"""An answer sent at once, in pieces: between two of them other requests have their turn."""

import asyncio

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from serving.gateway.dialect.writers import WholeWriter

_PIECE = 2**16  # bytes of an ASGI message


class WholeResponse(Response):
    """Sends the JSON of an answer whose chunks have all been added.

    Args:
        answer: The answer.
    """

    def __init__(self, answer: WholeWriter) -> None:
        self.status_code = 200
        self.background = None
        self._pieces = list(answer.pieces())
        length = sum(map(len, self._pieces))
        self.init_headers({"content-length": str(length), "content-type": "application/json"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer as an ASGI application does."""
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        waiting = bytearray()
        for whole in self._pieces:
            for start in range(0, len(whole), _PIECE):
                waiting += memoryview(whole)[start : start + _PIECE]
                if len(waiting) >= _PIECE:
                    await send(_body(waiting, more=True))
                    waiting.clear()
                    await asyncio.sleep(0)
        await send(_body(waiting, more=False))


def _body(content: bytearray, *, more: bool) -> dict[str, object]:
    return {"type": "http.response.body", "body": bytes(content), "more_body": more}
