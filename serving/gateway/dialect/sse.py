"""A stream of server-sent events, written as bytes at once.

A stream is made of `data:` lines and nothing else: Azure's clients refuse comments and named
events, so that a heartbeat has to be a chunk without choices. All of it is ASCII: clients that
split lines where Unicode does, or decode the network's pieces one by one, would break the text
otherwise.

Events are most of what the gateway does, one for each token of each client. So what a stream's
events share is written once, and text is the only thing that is encoded for each. The types of
these chunks are `wire.ChatCompletionChunk` and `wire.TextCompletion`.
"""

import json
from collections.abc import Sequence

from serving.errors import ServingError
from serving.gateway.dialect.chat import response as reply
from serving.proto import inference_pb2

# The end of a stream; .NET's client waits for it for ever.
DONE = b"data: [DONE]\n\n"


class Events:
    """The events of one answer.

    Args:
        identity: What all of them carry.
        include_usage: Whether the usage gets a chunk of its own, without choices. A client of
            OpenAI's that asks for this has it there only, because some add up what they meet.
    """

    kind: str

    def __init__(self, identity: reply.Identity, include_usage: bool) -> None:
        # The first bytes of all events, up to the choices.
        self._head = (
            f'data: {{"id":{json.dumps(identity.id)},"object":"{self.kind}",'
            f'"created":{identity.created},"model":{json.dumps(identity.model)},"choices":['
        )
        self._include_usage = include_usage

    def opening(self, choices: int) -> bytes:
        """What a stream begins with, before any text."""
        return b""

    def of(self, chunks: Sequence[inference_pb2.GenerateChunk]) -> bytes:
        """What the chunks of the service become: none to three events each."""
        return "".join(map(self._of, chunks)).encode()

    def heartbeat(self) -> bytes:
        """An event that only shows that the connection lives."""
        return f"{self._head}]}}\n\n".encode()

    def failure(self, error: ServingError) -> bytes:
        """The event that tells why the stream breaks off."""
        told = json.dumps(reply.error_body(error).error.model_dump(), separators=(",", ":"))
        return f'{self._head}],"error":{told}}}\n\n'.encode()

    def _of(self, chunk: inference_pb2.GenerateChunk) -> str:
        logprobs = self._logprobs(chunk) if chunk.logprobs else "null"
        if not chunk.finish_reason:
            return self._event(chunk.choice, chunk.text, logprobs) if chunk.text else ""
        text = ""
        if chunk.text:
            text, logprobs = self._event(chunk.choice, chunk.text, logprobs), "null"
        reason = f'"{reply.finish_reason(chunk)}"'
        if not chunk.HasField("usage"):
            return text + self._event(chunk.choice, "", logprobs, reason)
        usage = f',"usage":{reply.usage(chunk).model_dump_json()}'
        if not self._include_usage:
            return text + self._event(chunk.choice, "", logprobs, reason, usage)
        last = self._event(chunk.choice, "", logprobs, reason)
        return f"{text}{last}{self._head}]{usage}}}\n\n"

    def _event(
        self, index: int, text: str, logprobs: str, reason: str = "null", usage: str = ""
    ) -> str:
        raise NotImplementedError

    def _logprobs(self, chunk: inference_pb2.GenerateChunk) -> str:
        raise NotImplementedError


class ChatEvents(Events):
    """Of a chat: text comes in deltas, and the role before it."""

    kind = "chat.completion.chunk"

    def opening(self, choices: int) -> bytes:
        """The role of each choice, and no text yet."""
        return "".join(
            f'{self._head}{{"index":{index},"delta":{{"role":"assistant","content":""}},'
            '"finish_reason":null,"logprobs":null}]}\n\n'
            for index in range(choices)
        ).encode()

    def _event(
        self, index: int, text: str, logprobs: str, reason: str = "null", usage: str = ""
    ) -> str:
        return (
            f'{self._head}{{"index":{index},"delta":{{"content":{json.dumps(text)}}},'
            f'"finish_reason":{reason},"logprobs":{logprobs}}}]{usage}}}\n\n'
        )

    def _logprobs(self, chunk: inference_pb2.GenerateChunk) -> str:
        return json.dumps({"content": reply.chat_logprobs(chunk)}, separators=(",", ":"))


class TextEvents(Events):
    """Of a text completion."""

    kind = "text_completion"

    def __init__(self, identity: reply.Identity, include_usage: bool) -> None:
        super().__init__(identity, include_usage)
        self._lengths: dict[int, int] = {}  # of the tokens seen of each choice, in characters

    def _event(
        self, index: int, text: str, logprobs: str, reason: str = "null", usage: str = ""
    ) -> str:
        return (
            f'{self._head}{{"text":{json.dumps(text)},"index":{index},"logprobs":{logprobs},'
            f'"finish_reason":{reason}}}]{usage}}}\n\n'
        )

    def _logprobs(self, chunk: inference_pb2.GenerateChunk) -> str:
        offset = self._lengths.get(chunk.choice, 0)
        columns = reply.text_logprobs(chunk, offset)
        self._lengths[chunk.choice] = offset + sum(map(len, columns["tokens"]))
        return json.dumps(columns, separators=(",", ":"))
