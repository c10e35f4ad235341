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
from serving.gateway.dialect.chunks import (
    Identity,
    Usage,
    finish_reason,
    id_list,
    usage,
)
from serving.gateway.dialect.error_body import error_body, openai_error
from serving.gateway.dialect.fields import StreamUsage
from serving.proto import inference_pb2
from serving.proto.stop_reason import stop_reason

# The end of a stream; .NET's client waits for it for ever.
DONE = b"data: [DONE]\n\n"


class Events:
    """Writes the events of one answer; each kind of request has a subclass.

    Args:
        identity: The fields that all events carry.
        stream_usage: The chunks that have the usage. A client of OpenAI's that asks for one of its
            own must find it there only, because some clients add up all usages that they meet.

    Attributes:
        merges_end: Whether the chunk with the finish reason has the last text too, as vLLM's has.
    """

    kind: str
    merges_end = False

    def __init__(self, identity: Identity, stream_usage: StreamUsage = StreamUsage.LAST) -> None:
        # The first bytes of all events, up to the choices.
        self._head = (
            f'data: {{"id":{json.dumps(identity.id)},"object":"{self.kind}",'
            f'"created":{identity.created},"model":{json.dumps(identity.model)},"choices":['
        )
        self._stream_usage = stream_usage
        self._merges_end = self.merges_end or stream_usage is StreamUsage.ALL
        self._prompt_tokens = self._completion_tokens = 0  # so far
        self._tells_cached = identity.tells_cached
        self._is_openai = identity.is_openai
        self._returns_ids = identity.returns_ids

    def opening(self, choices: int, prompt_tokens: int = 0) -> bytes:
        """Returns the events that a stream of so many choices begins with, before any text.

        Args:
            choices: The number of choices.
            prompt_tokens: Tokens of the prompts that are known so far.
        """
        return b""

    def write(self, chunks: Sequence[inference_pb2.GenerateChunk]) -> bytes:
        """Returns the events of the chunks: three of each at most, and one for each call."""
        return "".join(map(self._told, chunks)).encode()

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

    def _told(self, chunk: inference_pb2.GenerateChunk) -> str:
        """Returns the events of a chunk; the first one has the ids of its tokens, if asked for."""
        events = self._events(chunk)
        if not self._returns_ids:
            return events
        members = self._ids(chunk)
        first = self._head + "{"  # at which a choice begins
        if not (members and events.startswith(first)):
            return events
        return first + members + events[len(first) :]

    def _ids(self, chunk: inference_pb2.GenerateChunk) -> str:
        """Returns the members of a choice that have ids, each with a comma behind it."""
        return f'"token_ids":[{id_list(chunk.token_ids)}],' if chunk.token_ids else ""

    def _events(self, chunk: inference_pb2.GenerateChunk) -> str:
        logprobs = self._logprobs(chunk) if chunk.logprobs else "null"
        self._prompt_tokens += chunk.prompt_tokens
        self._completion_tokens += len(chunk.token_ids)
        spent = self._spent(self._prompt_tokens)
        ends = bool(chunk.finish_reason)
        text = chunk.text if ends and self._merges_end and not chunk.tool_calls else ""
        news = "" if text else self._news(chunk, logprobs, spent)
        if not ends:
            return news
        if news:
            logprobs = "null"
        reason = f'"{finish_reason(chunk)}"' + self._stop_reason(chunk)
        if not chunk.HasField("usage") or self._stream_usage is StreamUsage.NONE:
            return news + self._event(chunk.choice, text, logprobs, reason, spent)
        whole = f',"usage":{usage(chunk, tells_cached=self._tells_cached).model_dump_json()}'
        if self._stream_usage is StreamUsage.LAST:
            return news + self._event(chunk.choice, text, logprobs, reason, whole)
        last = self._event(chunk.choice, text, logprobs, reason, spent)
        return f"{news}{last}{self._head}]{whole}}}\n\n"

    def _spent(self, prompt_tokens: int) -> str:
        """Returns the member `usage` of a chunk that tells what is spent so far; "" for none."""
        if self._stream_usage is not StreamUsage.ALL:
            return ""
        spent = Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=prompt_tokens + self._completion_tokens,
        )
        return f',"usage":{spent.model_dump_json()}'

    def _stop_reason(self, chunk: inference_pb2.GenerateChunk) -> str:
        """Returns the member `stop_reason`, which vLLM's choices have beside the finish reason."""
        return f',"stop_reason":{json.dumps(stop_reason(chunk))}' if self._is_openai else ""

    def _news(self, chunk: inference_pb2.GenerateChunk, logprobs: str, spent: str) -> str:
        """Returns the events of what a chunk adds to its choice; "" if that is nothing."""
        if not chunk.text:
            return ""
        return self._event(chunk.choice, chunk.text, logprobs, usage=spent)

    def _event(
        self, index: int, text: str, logprobs: str, reason: str = "null", usage: str = ""
    ) -> str:
        """Returns one event; all arguments but `index` and `text` are JSON already.

        `reason` may have further members of the choice behind it.
        """
        raise NotImplementedError

    def _logprobs(self, chunk: inference_pb2.GenerateChunk) -> str:
        """Returns the log-probabilities of the chunk's tokens as JSON."""
        raise NotImplementedError
