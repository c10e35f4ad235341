"""An answer of Anthropic's Messages API at once.

MessagesAnswer   GenerateChunks, as they come -> the JSON of a MessageObject

https://docs.claude.com/en/api/messages
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

from serving.gateway.dialect.anthropic.content import CALL_ID_PREFIX
from serving.gateway.dialect.chunks import Chunks, Identity
from serving.gateway.dialect.fields import Described
from serving.gateway.dialect.whole import check_size, encode
from serving.proto import inference_pb2

StopReason = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]
Encode = Callable[[str], str]


class AnswerText(Described):
    """A block of text."""

    type: Literal["text"] = "text"
    """Always `text`."""
    text: str
    """The text."""


class AnswerCall(Described):
    """A call of a tool, which the client is to run."""

    type: Literal["tool_use"] = "tool_use"
    """Always `tool_use`."""
    id: str
    """`toolu_` and nine letters and digits: the id that the call's result names."""
    name: str
    """The name of the tool."""
    input: dict[str, Any]
    """Its arguments."""


class MessagesUsage(Described):
    """Tokens spent."""

    input_tokens: int
    """Tokens of the rendered conversation, without cached ones."""
    cache_creation_input_tokens: Literal[0] = 0
    """Always 0: nobody pays for what is kept."""
    cache_read_input_tokens: int
    """Tokens of it that an earlier conversation of the caller had computed."""
    output_tokens: int
    """Tokens generated."""


class MessageObject(Described):
    """An answer of the Messages API."""

    id: str
    """`msg_` and 32 hexadecimal digits."""
    type: Literal["message"] = "message"
    """Always `message`."""
    role: Literal["assistant"] = "assistant"
    """Always `assistant`."""
    model: str
    """The name of the served model, whatever name was asked for."""
    content: list[AnswerText | AnswerCall]
    """Blocks of text, and calls of tools; none where the model ends at once."""
    stop_reason: StopReason | None
    """Why it ended; null at the beginning of a stream."""
    stop_sequence: str | None
    """The text of `stop_sequences` that ended it."""
    usage: MessagesUsage
    """All tokens spent."""


class TokenCountAnswer(Described):
    """The answer of count_tokens."""

    input_tokens: int
    """Tokens of the rendered conversation, with its tools."""


class MessagesAnswer:
    """Writes a `MessageObject` at once.

    Args:
        identity: The fields of the answer that are known before.
        max_tokens: Tokens that the request allows.
    """

    def __init__(self, identity: Identity, max_tokens: int) -> None:
        self._identity = identity
        self._max_tokens = max_tokens
        self._blocks: list[str] = []  # each whole, as JSON
        self._text = bytearray()  # of the open block, the inside of a JSON string
        self._num_bytes = 0
        self._end = ""

    def add(self, chunks: Chunks) -> None:
        """Writes chunks in the order in which they came.

        Raises:
            InvalidRequest: The answer has more bytes than an answer at once may have.
        """
        for chunk in chunks:
            self._text += encode(chunk.text)[1:-1].encode()
            for call in chunk.tool_calls:
                self._end_text()
                self._add(f"{begun_call(call, encode)}{call.arguments or '{}'}}}")
            if chunk.finish_reason:
                self._end = f"{end_of(chunk, self._max_tokens, encode)}"
            if chunk.HasField("usage"):
                self._end += f',"usage":{usage_of(chunk).model_dump_json()}}}'
        check_size(self._num_bytes + len(self._text))

    def pieces(self) -> Iterator[bytes | bytearray]:
        """Yields the whole answer as JSON; call it when all chunks have been added."""
        self._end_text()
        yield f"{head_of(self._identity, encode)}[{','.join(self._blocks)}],{self._end}".encode()

    def _end_text(self) -> None:
        if self._text:
            self._add(f'{{"type":"text","text":"{self._text.decode()}"}}')
            self._text.clear()

    def _add(self, block: str) -> None:
        self._blocks.append(block)
        self._num_bytes += len(block)


def head_of(identity: Identity, encode: Encode) -> str:
    """Returns the beginning of a `MessageObject`, to its content."""
    return (
        f'{{"id":{encode(identity.id)},"type":"message","role":"assistant",'
        f'"model":{encode(identity.model)},"content":'
    )


def begun_call(call: inference_pb2.ToolCall, encode: Encode) -> str:
    """Returns the beginning of an `AnswerCall`, to its input."""
    return (
        f'{{"type":"tool_use","id":{encode(CALL_ID_PREFIX + call.id)},'
        f'"name":{encode(call.name)},"input":'
    )


def end_of(chunk: inference_pb2.GenerateChunk, max_tokens: int, encode: Encode) -> str:
    """Returns the two fields that say how an answer ended, from its last chunk.

    Args:
        chunk: The last chunk.
        max_tokens: Tokens that the request allows.
        encode: Writes a text as JSON.
    """
    reason: StopReason = "end_turn"
    stopped_by = chunk.stop_text if chunk.WhichOneof("stop_reason") == "stop_text" else None
    if stopped_by is not None:
        reason = "stop_sequence"
    elif chunk.finish_reason == inference_pb2.FINISH_REASON_TOOL_CALLS:
        reason = "tool_use"
    elif chunk.finish_reason == inference_pb2.FINISH_REASON_LENGTH:
        is_full = chunk.usage.completion_tokens < max_tokens and not chunk.stop_token_id
        reason = "model_context_window_exceeded" if is_full else "max_tokens"
    sequence = "null" if stopped_by is None else encode(stopped_by)
    return f'"stop_reason":"{reason}","stop_sequence":{sequence}'


def usage_of(chunk: inference_pb2.GenerateChunk) -> MessagesUsage:
    """Returns the tokens spent, which the last chunk of an answer carries."""
    spent = chunk.usage
    return MessagesUsage(
        input_tokens=spent.prompt_tokens - spent.cached_tokens,
        cache_read_input_tokens=spent.cached_tokens,
        output_tokens=spent.completion_tokens,
    )
