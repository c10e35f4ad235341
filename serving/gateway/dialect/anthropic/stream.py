"""An answer of Anthropic's Messages API as a stream: named events, block by block.

`message_stop` is the last one; no [DONE] follows. A heartbeat is the event `ping`, which all
readers of this API leave out.

https://docs.claude.com/en/docs/build-with-claude/streaming
"""

import json
from typing import Literal

from pydantic import Field

from serving.errors import ServingError
from serving.gateway.dialect.anthropic.error import (
    MESSAGE_ID_PREFIX,
    AnthropicErrorDetail,
    anthropic_error,
)
from serving.gateway.dialect.anthropic.response import (
    AnswerCall,
    AnswerText,
    MessageObject,
    MessagesUsage,
    StopReason,
    begun_call,
    end_of,
    head_of,
    usage_of,
)
from serving.gateway.dialect.chunks import Chunks, Identity
from serving.gateway.dialect.fields import Described, is_none
from serving.proto import inference_pb2

_PING = 'event: ping\ndata: {"type":"ping"}\n\n'


class MessageDelta(Described):
    """News of an event: the text or arguments of a block, or how the message ended."""

    type: Literal["text_delta", "input_json_delta"] | None = Field(default=None, exclude_if=is_none)
    """Of a block: what is added to it."""
    text: str | None = Field(default=None, exclude_if=is_none)
    """New text."""
    partial_json: str | None = Field(default=None, exclude_if=is_none)
    """All arguments of a call, as JSON."""
    stop_reason: StopReason | None = Field(default=None, exclude_if=is_none)
    """Of the message: why it ended."""
    stop_sequence: str | None = None
    """The text of `stop_sequences` that ended it; null too."""


class MessageEvent(Described):
    """One event of a stream; which of its fields it has depends on its type."""

    type: Literal[
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]
    """Its name, which stands in the line `event:` too."""
    message: MessageObject | None = Field(default=None, exclude_if=is_none)
    """Of `message_start`: the answer, still without content."""
    index: int | None = Field(default=None, exclude_if=is_none)
    """The place of the block."""
    content_block: AnswerText | AnswerCall | None = Field(default=None, exclude_if=is_none)
    """The block that begins, still empty."""
    delta: MessageDelta | None = Field(default=None, exclude_if=is_none)
    """What is new."""
    usage: MessagesUsage | None = Field(default=None, exclude_if=is_none)
    """Of `message_delta`: all tokens spent."""
    error: AnthropicErrorDetail | None = Field(default=None, exclude_if=is_none)
    """Why the stream breaks off after this event."""
    request_id: str | None = Field(default=None, exclude_if=is_none)
    """Of `error`: `req_` and the request's id."""


class MessagesEvents:
    """Writes the events of an answer.

    Args:
        identity: The fields of the answer that are known before.
        max_tokens: Tokens that the request allows.
    """

    def __init__(self, identity: Identity, max_tokens: int) -> None:
        self._identity = identity
        self._max_tokens = max_tokens
        self._has_started = self._is_in_text = False
        self._index = 0  # of the open block, or of the next one

    def opening(self, choices: int, prompt_tokens: int = 0) -> bytes:
        """Returns nothing: the first event tells the tokens of the prompt."""
        return b""

    def write(self, chunks: Chunks) -> bytes:
        """Returns the events of the service's chunks."""
        begun = ""
        if not self._has_started and chunks:
            self._has_started = True
            begun = self._start(chunks)
        return (begun + "".join(map(self._events, chunks))).encode()

    def heartbeat(self) -> bytes:
        """Returns an event that only shows that the connection lives."""
        return _PING.encode()

    def failure(self, error: ServingError) -> bytes:
        """Returns the event that says why the stream breaks off."""
        request_id = self._identity.id.removeprefix(MESSAGE_ID_PREFIX)
        body = anthropic_error(error, request_id).model_dump()
        fields = json.dumps(body, separators=(",", ":"))
        return f"event: error\ndata: {fields}\n\n".encode()

    def closing(self) -> bytes:
        """Returns nothing: the last event is the end."""
        return b""

    def _start(self, chunks: Chunks) -> str:
        prompt = max(chunk.prompt_tokens or chunk.usage.prompt_tokens for chunk in chunks)
        cached = max(chunk.cached_tokens for chunk in chunks)
        usage = MessagesUsage(
            input_tokens=prompt - cached, cache_read_input_tokens=cached, output_tokens=0
        )
        message = (
            f'{head_of(self._identity, json.dumps)}[],"stop_reason":null,"stop_sequence":null,'
            f'"usage":{usage.model_dump_json()}}}'
        )
        return _event("message_start", f'"message":{message}') + _PING

    def _events(self, chunk: inference_pb2.GenerateChunk) -> str:
        written = self._text(chunk.text) if chunk.text else ""
        for call in chunk.tool_calls:
            written += self._end_text() + self._call(call)
        if chunk.finish_reason:
            written += self._end_text()
            if chunk.HasField("usage"):
                written += _event(
                    "message_delta",
                    f'"delta":{{{end_of(chunk, self._max_tokens, json.dumps)}}},'
                    f'"usage":{usage_of(chunk).model_dump_json()}',
                ) + _event("message_stop")
        return written

    def _text(self, text: str) -> str:
        begun = ""
        if not self._is_in_text:
            self._is_in_text = True
            begun = self._block("start", ',"content_block":{"type":"text","text":""}')
        delta = f'{{"type":"text_delta","text":{json.dumps(text)}}}'
        return begun + self._block("delta", f',"delta":{delta}')

    def _end_text(self) -> str:
        """Returns the end of the open block; nothing if none is open."""
        if not self._is_in_text:
            return ""
        self._is_in_text = False
        return self._end_block()

    def _call(self, call: inference_pb2.ToolCall) -> str:
        """Returns the events of a call, which is whole when it comes."""
        delta = f'{{"type":"input_json_delta","partial_json":{json.dumps(call.arguments)}}}'
        return (
            self._block("start", f',"content_block":{begun_call(call, json.dumps)}{{}}}}')
            + self._block("delta", f',"delta":{delta}')
            + self._end_block()
        )

    def _end_block(self) -> str:
        ended = self._block("stop")
        self._index += 1
        return ended

    def _block(self, news: str, fields: str = "") -> str:
        return _event(f"content_block_{news}", f'"index":{self._index}{fields}')


def _event(name: str, fields: str = "") -> str:
    comma = "," if fields else ""
    return f'event: {name}\ndata: {{"type":"{name}"{comma}{fields}}}\n\n'
