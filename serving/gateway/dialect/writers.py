"""Writers of answers, as the gateway uses them whatever the kind of the request.

A kind of request makes both from the identity of an answer and the request that it answers.
"""

from collections.abc import Iterator
from typing import Protocol

from serving.errors import ServingError
from serving.gateway.dialect.chunks import Chunks


class WholeWriter(Protocol):
    """Writes an answer at once while its chunks come."""

    def add(self, chunks: Chunks) -> None:
        """Writes chunks in the order in which they came.

        Raises:
            InvalidRequest: The answer is too long to be held.
        """

    def pieces(self) -> Iterator[bytes | bytearray]:
        """Yields the whole answer as JSON; call it when all chunks have been added."""


class EventWriter(Protocol):
    """Writes an answer as a stream of server-sent events."""

    def opening(self, choices: int, prompt_tokens: int = 0) -> bytes:
        """Returns the events that a stream of so many choices begins with, before any text.

        Args:
            choices: The number of choices.
            prompt_tokens: Tokens of the prompts that are known so far.
        """

    def write(self, chunks: Chunks) -> bytes:
        """Returns the events of the service's chunks, which may be none."""

    def heartbeat(self) -> bytes:
        """Returns what only shows that the connection lives."""

    def failure(self, error: ServingError) -> bytes:
        """Returns the event that says why the stream breaks off."""

    def closing(self) -> bytes:
        """Returns what follows the last event of a whole answer."""
