"""A chat's answer as a stream: text comes in deltas, and the role before it.

A call of a tool comes whole in one delta: Mistral's client refuses a delta of a call without name
and arguments, and others keep the first delta only.
"""

import json
from typing import Literal

from pydantic import Field

from serving.gateway.dialect.chat.response import Logprobs, ToolCall, chat_logprobs, tool_call
from serving.gateway.dialect.chunks import Identity, Usage, id_list
from serving.gateway.dialect.error_body import ErrorDetail, OpenAIErrorDetail
from serving.gateway.dialect.fields import Described, StreamUsage, is_none
from serving.gateway.dialect.sse import Events
from serving.proto import inference_pb2


class Delta(Described):
    """The text that a chunk adds."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=is_none)
    """In the first chunk only."""
    content: str
    """The new text; empty in the first and the last chunk and beside calls, never null."""
    tool_calls: list[ToolCall] | None = Field(default=None, exclude_if=is_none)
    """A tool that is to be called, whole; absent in all other chunks."""


class ChunkChoice(Described):
    """The news of one answer."""

    index: int
    """Its place among the choices."""
    delta: Delta
    """The new text."""
    finish_reason: str | None = None
    """`stop`, `length` or `tool_calls` in the last chunk, null before."""
    stop_reason: str | int | None = Field(default=None, exclude_if=is_none)
    """vLLM's, on the paths of OpenAI's clients, in the last chunk: the text of `stop` or the id of
    `stop_token_ids` that ended it; null if neither did."""
    token_ids: list[int] | None = Field(default=None, exclude_if=is_none)
    """vLLM's: the ids of its tokens, where `return_token_ids` asked for them."""
    logprobs: Logprobs | None = None
    """Log-probabilities of the same tokens, where they were asked for."""


class ChatCompletionChunk(Described):
    """One event of a stream."""

    id: str
    """32 hexadecimal digits, the same in all chunks."""
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    """Always `chat.completion.chunk`."""
    created: int
    """Seconds since 1970, the same in all chunks."""
    model: str
    """The name of the served model."""
    choices: list[ChunkChoice]
    """One choice; none in a heartbeat, a chunk of usage, a failure."""
    usage: Usage | None = Field(default=None, exclude_if=is_none)
    """Tokens spent, in one chunk at the end."""
    prompt_token_ids: list[int] | None = Field(default=None, exclude_if=is_none)
    """The prompt's tokens, in the first chunk, where `return_token_ids` asked for them."""
    error: ErrorDetail | OpenAIErrorDetail | None = Field(default=None, exclude_if=is_none)
    """Why the stream breaks off after this chunk."""


class ChatEvents(Events):
    """Writes the events of a chat, whose type is `ChatCompletionChunk`."""

    kind = "chat.completion.chunk"

    def __init__(self, identity: Identity, stream_usage: StreamUsage = StreamUsage.LAST) -> None:
        super().__init__(identity, stream_usage)
        self._num_calls: dict[int, int] = {}  # by choice
        self._prompt_ids = ""
        if identity.returns_ids:
            self._prompt_ids = f',"prompt_token_ids":[{id_list(identity.prompt_ids)}]'

    def opening(self, choices: int, prompt_tokens: int = 0) -> bytes:
        """Returns an event for each choice, with its role and no text yet."""
        spent = self._spent(prompt_tokens)
        return "".join(
            f'{self._head}{{"index":{index},"delta":{{"role":"assistant","content":""}},'
            f'"finish_reason":null,"logprobs":null}}]{spent}{"" if index else self._prompt_ids}}}'
            "\n\n"
            for index in range(choices)
        ).encode()

    def _news(self, chunk: inference_pb2.GenerateChunk, logprobs: str, spent: str) -> str:
        events = super()._news(chunk, logprobs, spent)
        for call in chunk.tool_calls:
            place = self._num_calls.get(chunk.choice, 0)
            self._num_calls[chunk.choice] = place + 1
            events += (
                f'{self._head}{{"index":{chunk.choice},"delta":{{"content":"","tool_calls":['
                f'{tool_call(call, place, json.dumps)}]}},"finish_reason":null,'
                f'"logprobs":{"null" if events else logprobs}}}]{spent}}}\n\n'
            )
        return events

    def _event(
        self, index: int, text: str, logprobs: str, reason: str = "null", usage: str = ""
    ) -> str:
        return (
            f'{self._head}{{"index":{index},"delta":{{"content":{json.dumps(text)}}},'
            f'"finish_reason":{reason},"logprobs":{logprobs}}}]{usage}}}\n\n'
        )

    def _logprobs(self, chunk: inference_pb2.GenerateChunk) -> str:
        return f'{{"content":[{chat_logprobs(chunk, json.dumps)}]}}'
