"""An answer of the Responses API as a stream: named events, each with its number.

The order is OpenAI's. `response.completed`, `response.incomplete` or `response.failed` is the last
one; no [DONE] follows. A heartbeat is a comment, because all readers of these events take comments
and none takes an event that the API does not have.

https://platform.openai.com/docs/api-reference/responses-streaming
"""

import json
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from serving.errors import InvalidRequest, Overloaded, ServingError
from serving.gateway.dialect.chat.response import TokenLogprob
from serving.gateway.dialect.chunks import Chunks, Identity
from serving.gateway.dialect.fields import Described, is_none
from serving.gateway.dialect.responses.output import CallItem, MessageItem, has_text
from serving.gateway.dialect.responses.response import (
    OutputFunctionCall,
    OutputMessage,
    OutputText,
    ResponseObject,
    ResponseWriter,
    Status,
    status_of,
    usage_of,
)
from serving.proto import inference_pb2


class ResponseEvent(Described):
    """One event of a stream; which of its fields it has depends on its type."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    """Its name, which stands in the line `event:` too."""
    sequence_number: int
    """Its place in the stream, from 0."""
    response: ResponseObject | None = Field(default=None, exclude_if=is_none)
    """Of the first two and the last event: the answer as it is now."""
    output_index: int | None = Field(default=None, exclude_if=is_none)
    """The place of the item."""
    item: OutputMessage | OutputFunctionCall | None = Field(default=None, exclude_if=is_none)
    """The item that begins or ends."""
    item_id: str | None = Field(default=None, exclude_if=is_none)
    """The item that grows."""
    content_index: int | None = Field(default=None, exclude_if=is_none)
    """The place of the part; always 0."""
    content_part: OutputText | None = Field(default=None, alias="part", exclude_if=is_none)
    """The part that begins or ends."""
    delta: str | None = Field(default=None, exclude_if=is_none)
    """New text, or arguments."""
    text: str | None = Field(default=None, exclude_if=is_none)
    """All text of the part."""
    logprobs: list[TokenLogprob] | None = Field(default=None, exclude_if=is_none)
    """Log-probabilities of the tokens of the text."""
    name: str | None = Field(default=None, exclude_if=is_none)
    """The function that is called."""
    arguments: str | None = Field(default=None, exclude_if=is_none)
    """All its arguments."""


class ResponsesEvents:
    """Writes the events of an answer.

    Args:
        identity: The fields of the answer that are known before.
        repeated: The fields that repeat parameters of the request.
    """

    def __init__(self, identity: Identity, repeated: Mapping[str, object]) -> None:
        self._writer = ResponseWriter(identity, repeated, json.dumps)
        self._output = self._writer.output
        self._message: MessageItem | None = None  # the open one
        self._number = 0  # of the next event

    def opening(self, choices: int, prompt_tokens: int = 0) -> bytes:
        """Returns the events that a stream begins with; there is one choice."""
        written = self._writer.written("in_progress")
        opened = [f'"response":{written}'] * 2
        names = ("response.created", "response.in_progress")
        return "".join(map(self._event, names, opened)).encode()

    def write(self, chunks: Chunks) -> bytes:
        """Returns the events of the service's chunks.

        Raises:
            InvalidRequest: The answer is too long to be repeated at its end.
        """
        written = "".join(map(self._events, chunks)).encode()
        self._output.check_size()
        return written

    def heartbeat(self) -> bytes:
        """Returns a comment, which only shows that the connection lives."""
        return b": heartbeat\n\n"

    def failure(self, error: ServingError) -> bytes:
        """Returns the event that says why the stream breaks off."""
        code = "server_error"
        if isinstance(error, InvalidRequest):
            code = "invalid_prompt"
        elif isinstance(error, Overloaded):
            code = "rate_limit_exceeded"
        failure = json.dumps({"code": code, "message": str(error)}, separators=(",", ":"))
        response = self._writer.written("failed", error=failure)
        return self._event("response.failed", f'"response":{response}').encode()

    def closing(self) -> bytes:
        """Returns nothing: the last event is the end."""
        return b""

    def _events(self, chunk: inference_pb2.GenerateChunk) -> str:
        written = self._delta(chunk) if has_text(chunk) else ""
        for call in chunk.tool_calls:
            written += self._end_message("completed") + self._call(self._output.add_call(call))
        if not chunk.finish_reason:
            return written
        status = status_of(chunk)
        if not self._output.items:
            written += self._begin_message()
        written += self._end_message(status)
        if chunk.HasField("usage"):
            response = self._writer.written(status, usage_of(chunk).model_dump_json())
            written += self._event(f"response.{status}", f'"response":{response}')
        return written

    def _delta(self, chunk: inference_pb2.GenerateChunk) -> str:
        begun = "" if self._message else self._begin_message()
        assert self._message is not None
        text, logprobs = self._message.add(chunk)
        return begun + self._event(
            "response.output_text.delta",
            f'{self._place(self._message)},"content_index":0,"delta":"{text}",'
            f'"logprobs":[{logprobs}]',
        )

    def _begin_message(self) -> str:
        message = self._message = self._output.begin_message()
        place = f'{self._place(message)},"content_index":0'
        return self._item("added", message, "in_progress") + self._event(
            "response.content_part.added", f'{place},"part":{message.part()}'
        )

    def _end_message(self, status: Status) -> str:
        """Returns the last events of the open message; none if no message is open."""
        message, self._message = self._message, None
        if message is None:
            return ""
        place = f'{self._place(message)},"content_index":0'
        text = f'"text":"{message.text.decode()}","logprobs":[{message.logprobs.decode()}]'
        return (
            self._event("response.output_text.done", f"{place},{text}")
            + self._event("response.content_part.done", f'{place},"part":{message.part()}')
            + self._item("done", message, status)
        )

    def _call(self, call: CallItem) -> str:
        """Returns the events of a call, which is whole when it comes."""
        place = self._place(call)
        return (
            self._item("added", call, "in_progress")
            + self._event(
                "response.function_call_arguments.delta", f'{place},"delta":{call.arguments}'
            )
            + self._event(
                "response.function_call_arguments.done",
                f'{place},"name":{call.name},"arguments":{call.arguments}',
            )
            + self._item("done", call, "completed")
        )

    def _item(self, news: str, item: MessageItem | CallItem, status: Status) -> str:
        written = item.item(status, is_empty=news == "added")
        index = len(self._output.items) - 1
        return self._event(
            f"response.output_item.{news}", f'"output_index":{index},"item":{written}'
        )

    def _place(self, item: MessageItem | CallItem) -> str:
        """Returns the fields that name the item at the end of the output."""
        return f'"item_id":{json.dumps(item.id)},"output_index":{len(self._output.items) - 1}'

    def _event(self, name: str, fields: str) -> str:
        number, self._number = self._number, self._number + 1
        return f'event: {name}\ndata: {{"type":"{name}","sequence_number":{number},{fields}}}\n\n'
