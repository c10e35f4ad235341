"""Ending the gateway without breaking anything off.

After the first SIGTERM or SIGINT it still listens: requests under way go on, and new ones are told
503, which sends a client to another gateway sooner than a refused connection does. It ends when the
last answer has, or after the time that it may take. A second signal ends it at once.
"""

import time
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

LIVE = "/health/live"  # answered to the end


class Drain:
    """An ASGI application around another, which counts what is under way and can close the door.

    Args:
        app: The application.
        refuse: The one that answers in its place after `begin`.
        seconds: How long answers may take after `begin`.
    """

    def __init__(self, app: ASGIApp, refuse: ASGIApp, seconds: float) -> None:
        self._app = app
        self._refuse = refuse
        self._seconds = seconds
        self._under_way = 0
        self._deadline: float | None = None  # time.monotonic(); set by `begin`

    @property
    def has_begun(self) -> bool:
        return self._deadline is not None

    @property
    def is_over(self) -> bool:
        """Whether nothing is under way any more, or the time is up."""
        if self._deadline is None:
            return False
        return self._under_way == 0 or time.monotonic() > self._deadline

    def begin(self) -> None:
        """From now on requests are refused."""
        self._deadline = time.monotonic() + self._seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if self.has_begun and scope["path"] != LIVE:
            return await self._refuse(scope, receive, send)
        self._under_way += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._under_way -= 1


class DrainingServer(uvicorn.Server):
    """uvicorn, which of itself stops listening at the first signal."""

    def __init__(self, config: uvicorn.Config, drain: Drain) -> None:
        super().__init__(config)
        self._drain = drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins the drain; at the second signal, ends."""
        if self._drain.has_begun:
            super().handle_exit(sig, frame)
        else:
            self._drain.begin()

    async def on_tick(self, counter: int) -> bool:
        """Whether to end; uvicorn asks ten times a second."""
        return await super().on_tick(counter) or self._drain.is_over
