"""A stream of server-sent events, written as bytes at once: the frame that all kinds share.

A stream is made of `data:` lines and nothing else: Azure's clients refuse comments and named
events, so that a heartbeat has to be a chunk without choices. All of it is ASCII: clients that
split lines where Unicode does, or decode the network's pieces one by one, would break the text
otherwise.

Events are most of what the gateway does, one for each token of each client. Therefore the text
that a stream's events share is written once, and only the new text is encoded for each event. The
types of these chunks stand beside each kind's events; a test holds both to the same bytes.
"""

import json
from collections.abc import Sequence

from serving.errors import ServingError
from serving.gateway.dialect.chunks import Identity, finish_reason, usage
from serving.gateway.dialect.error_body import error_body, openai_error
from serving.proto import inference_pb2

# The end of a stream; .NET's client waits for it for ever.
DONE = b"data: [DONE]\n\n"


class Events:
    """Writes the events of one answer; each kind of request has a subclass.

    Args:
        identity: The fields that all events carry.
        include_usage: Whether the usage gets a chunk of its own, without choices. A client of
            OpenAI's that asks for this must find it there only, because some clients add up all
            usages that they meet.
    """

    kind: str

    def __init__(self, identity: Identity, include_usage: bool) -> None:
        # The first bytes of all events, up to the choices.
        self._head = (
            f'data: {{"id":{json.dumps(identity.id)},"object":"{self.kind}",'
            f'"created":{identity.created},"model":{json.dumps(identity.model)},"choices":['
        )
        self._include_usage = include_usage
        self._tells_cached = identity.tells_cached
        self._is_openai = identity.is_openai

    def opening(self, choices: int) -> bytes:
        """Returns the events that a stream of so many choices begins with, before any text."""
        return b""

    def write(self, chunks: Sequence[inference_pb2.GenerateChunk]) -> bytes:
        """Returns the events of the chunks: three of each at most, and one for each call."""
        return "".join(map(self._events, chunks)).encode()

    def heartbeat(self) -> bytes:
        """Returns an event that only shows that the connection lives."""
        return f"{self._head}]}}\n\n".encode()

    def failure(self, error: ServingError) -> bytes:
        """Returns the event that says why the stream breaks off."""
        body = openai_error(error) if self._is_openai else error_body(error)
        fields = json.dumps(body.error.model_dump(), separators=(",", ":"))
        return f'{self._head}],"error":{fields}}}\n\n'.encode()

    def closing(self) -> bytes:
        """Returns what follows the last event of a whole answer."""
        return DONE

    def _events(self, chunk: inference_pb2.GenerateChunk) -> str:
        logprobs = self._logprobs(chunk) if chunk.logprobs else "null"
        text = self._news(chunk, logprobs)
        if not chunk.finish_reason:
            return text
        if text:
            logprobs = "null"
        reason = f'"{finish_reason(chunk)}"'
        if not chunk.HasField("usage"):
            return text + self._event(chunk.choice, "", logprobs, reason)
        spent = f',"usage":{usage(chunk, tells_cached=self._tells_cached).model_dump_json()}'
        if not self._include_usage:
            return text + self._event(chunk.choice, "", logprobs, reason, spent)
        last = self._event(chunk.choice, "", logprobs, reason)
        return f"{text}{last}{self._head}]{spent}}}\n\n"

    def _news(self, chunk: inference_pb2.GenerateChunk, logprobs: str) -> str:
        """Returns the events of what a chunk adds to its choice; "" if that is nothing."""
        return self._event(chunk.choice, chunk.text, logprobs) if chunk.text else ""

    def _event(
        self, index: int, text: str, logprobs: str, reason: str = "null", usage: str = ""
    ) -> str:
        """Returns one event; all arguments but `index` and `text` are JSON already."""
        raise NotImplementedError

    def _logprobs(self, chunk: inference_pb2.GenerateChunk) -> str:
        """Returns the log-probabilities of the chunk's tokens as JSON."""
        raise NotImplementedError
