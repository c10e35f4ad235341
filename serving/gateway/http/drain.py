"""Draining: the gateway ends without breaking off the answers under way.

After the first SIGTERM or SIGINT it still listens: requests under way go on, and new ones get 503,
which sends a client to another gateway sooner than a refused connection does. It ends when the last
answer has ended, or when the time for draining is over. A second signal ends it at once.

Load balancers learn some seconds late that a gateway ends. With a delay, requests are still served
for so long after the signal, while /health/ready already answers 503, and then the drain begins.
"""

import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

LIVE = "/health/live"  # answered while draining too
READY = frozenset({"/health/ready", "/health", "/ping"})  # refused from the signal on


class Drain:
    """An ASGI application around another, which counts requests and can refuse new ones.

    Args:
        app: The application.
        refuse: The application that answers in its place after `begin`.
        seconds: The time that answers may take when new requests are refused.
        delay: The time after `begin` in which only requests for readiness are refused.
        clock: Time in seconds that never goes back.
    """

    def __init__(
        self,
        app: ASGIApp,
        refuse: ASGIApp,
        seconds: float,
        delay: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._refuse = refuse
        self._seconds = seconds
        self._delay = delay
        self._clock = clock
        self._running = 0
        self._refuses_at: float | None = None  # set by `begin`

    def around(self, app: ASGIApp) -> "Drain":
        """Takes the place of `app`, the application that it passes requests on to."""
        self._app = app
        return self

    @property
    def has_begun(self) -> bool:
        """Returns whether readiness fails."""
        return self._refuses_at is not None

    @property
    def is_refusing(self) -> bool:
        """Returns whether all new requests are refused."""
        return self._refuses_at is not None and self._clock() >= self._refuses_at

    @property
    def is_over(self) -> bool:
        """Returns whether the last answer has ended, or the time for it."""
        if self._refuses_at is None or not self.is_refusing:
            return False
        return self._running == 0 or self._clock() > self._refuses_at + self._seconds

    def begin(self) -> None:
        """Starts to refuse requests for readiness, and all new ones after the delay."""
        self._refuses_at = self._clock() + self._delay

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"]
        if path != LIVE and (self.is_refusing or (self.has_begun and path in READY)):
            return await self._refuse(scope, receive, send)
        self._running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running -= 1


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which drains at the first signal instead of closing its port.

    Args:
        config: Its configuration, whose application is `drain`.
        drain: The drain to begin.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain) -> None:
        super().__init__(config)
        self._drain = drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins the drain at the first signal; ends at the second."""
        if self._drain.has_begun:
            super().handle_exit(sig, frame)
        else:
            self._drain.begin()

    async def on_tick(self, counter: int) -> bool:
        """Returns whether to end; uvicorn asks ten times a second."""
        return await super().on_tick(counter) or self._drain.is_over
