"""Outlets: the ways on which what happens to requests leaves the engine's thread.

An outlet gets everything of one turn at once, so that whoever waits behind it, an event loop or
another process, is woken once a turn and not once a token. Requests come in one by one, through an
Inlet.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from serving.errors import ServingError
from serving.scheduling.request import Event, Request


class Queued(Enum):
    """The first thing that is told of a request, unless it was refused."""

    QUEUED = "queued"


Item = tuple[str, Event | Queued | ServingError]
"""The id of a request, and what has happened to it. Nothing follows on an error, nor on the event
with which the last of its choices ends."""


class Outlet(Protocol):
    """Takes what has happened to the requests that were sent with it. Compared by identity."""

    def put(self, items: Sequence[Item]) -> None:
        """Takes the items of one turn, at least one, in their order; must not raise, nor wait.

        The engine's thread calls it up to twice a turn: with what was queued or refused before the
        step, and with the step's events. When the engine ends, another thread may call it once.
        """


class Inlet(Protocol):
    """The way of requests to an engine, for any thread; what becomes of them goes to an outlet."""

    def send(self, request: Request, outlet: Outlet) -> None:
        """Sends a request on its way. Raises a ServingError if the engine takes none any more."""

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Has a request, or one choice of it, computed no more; does nothing if it has ended.

        What was put into its outlet before stays there.
        """
