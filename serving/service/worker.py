"""Worker: the engine as the service sees it, in a thread of this process or in another process."""

from typing import Protocol

from serving.engine.submission import Submission
from serving.scheduling.request import Request


class Worker(Protocol):
    """Computes requests; for the coroutines of one event loop."""

    async def admits(self, n: int, caller: str) -> bool:
        """Returns True if the queue would take a request of n choices of this caller now.

        An estimate, to refuse a request before it is rendered; `Submission.accepted` tells for
        certain.
        """

    def submit(self, request: Request) -> Submission:
        """Returns an iterator of the request's events; see `EngineWorker.submit`."""

    def end(self, request_id: str, choice: int) -> None:
        """Computes no more of a choice that has had a token, because its text has ended."""

    async def begin_drain(self) -> int:
        """Refuses every later request; returns the number of those that go on."""
