"""A chat's answer at once, and the log-probabilities of its tokens.

    ChatAnswer   GenerateChunks, as they come -> the JSON of a ChatCompletion

A key that is absent and a key that is null differ to some clients; these shapes are the ones that
every client we know reads without harm.
"""

from collections.abc import Callable, Iterator
from typing import Literal

from pydantic import Field

from serving.gateway.dialect.chunks import Chunks, Identity, Usage, finite_logprob, id_list
from serving.gateway.dialect.fields import Described, is_none
from serving.gateway.dialect.prompt_scores import PromptLogprobs, prompt_entries
from serving.gateway.dialect.whole import ID_BYTES, WholeAnswer, WholeChoice, encode
from serving.proto import inference_pb2


class TopLogprob(Described):
    """A token, and how likely it was."""

    token: str
    """Its text; U+FFFD where that is only a piece of a character."""
    token_id: int
    """Its id, which Mistral's client needs."""
    logprob: float
    """The natural logarithm of its probability."""
    bytes: list[int]
    """Its bytes."""


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]
    """The likeliest tokens in its place, likeliest first."""


class Logprobs(Described):
    """The log-probabilities that were asked for with `logprobs`."""

    content: list[TokenLogprob]
    """The tokens in order."""


class FunctionCall(Described):
    """A function that is to be called, and with what."""

    name: str
    """The function's name."""
    arguments: str
    """Its arguments, an object as JSON."""


class ToolCall(Described):
    """A call of a tool, whole."""

    id: str
    """Nine letters and digits."""
    type: Literal["function"] = "function"
    """Always `function`."""
    index: int
    """Its place among the calls of the choice."""
    function: FunctionCall
    """What is to be called."""


class AssistantMessage(Described):
    """The answer of a completion."""

    role: Literal["assistant"] = "assistant"
    """Always `assistant`."""
    content: str
    """The text, never null; mostly empty beside calls."""
    tool_calls: list[ToolCall] | None = None
    """Tools that are to be called; null if there are none."""


class Choice(Described):
    """One answer."""

    index: int
    """Its place among the choices."""
    message: AssistantMessage
    """The answer."""
    finish_reason: str
    """`stop`, `length` or `tool_calls`."""
    stop_reason: str | int | None = Field(default=None, exclude_if=is_none)
    """vLLM's, on the paths of OpenAI's clients: the text of `stop` or the id of `stop_token_ids`
    that ended it; null if neither did."""
    token_ids: list[int] | None = Field(default=None, exclude_if=is_none)
    """vLLM's: the ids of its tokens, where `return_token_ids` asked for them."""
    logprobs: Logprobs | None = None
    """Log-probabilities of the same tokens, where they were asked for."""


class ChatCompletion(Described):
    """The whole answer at once."""

    id: str
    """32 hexadecimal digits."""
    object: Literal["chat.completion"] = "chat.completion"
    """Always `chat.completion`."""
    created: int
    """Seconds since 1970."""
    model: str
    """The name of the served model, whatever name was asked for."""
    choices: list[Choice]
    """As many as were asked for, in order."""
    usage: Usage
    """Tokens spent."""
    prompt_logprobs: PromptLogprobs | None = Field(default=None, exclude_if=is_none)
    """Log-probabilities of the prompt's tokens, where `prompt_logprobs` asked for them; else null
    on the paths of OpenAI's clients."""
    prompt_token_ids: list[int] | None = Field(default=None, exclude_if=is_none)
    """The prompt's tokens, where `return_token_ids` asked for them."""


class ChatChoice(WholeChoice):
    """Writes a `Choice`."""

    def __init__(self, index: int, *, tells_stop: bool = False) -> None:
        super().__init__(index, tells_stop=tells_stop)
        self._logprobs = bytearray()  # the inside of the list `content`
        self._calls = bytearray()  # the inside of the list `tool_calls`
        self._num_calls = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""
        return super().num_bytes + len(self._logprobs) + len(self._calls)

    def add(self, chunk: inference_pb2.GenerateChunk) -> None:
        """Writes a chunk of the choice."""
        super().add(chunk)
        for call in chunk.tool_calls:
            if self._calls:
                self._calls += b","
            self._calls += tool_call(call, self._num_calls, encode).encode()
            self._num_calls += 1

    def add_logprobs(self, chunk: inference_pb2.GenerateChunk) -> None:
        """Writes the log-probabilities of a chunk, which has some."""
        if self._logprobs:
            self._logprobs += b","
        self._logprobs += chat_logprobs(chunk, encode).encode()

    def pieces(self) -> Iterator[bytes | bytearray]:
        """Yields the choice as JSON."""
        yield f'{{"index":{self.index},"message":{{"role":"assistant","content":"'.encode()
        yield self.text
        yield b'","tool_calls":'
        if self._calls:
            yield b"["
            yield self._calls
            yield b"]"
        else:
            yield b"null"
        yield f'}},"finish_reason":{encode(self.reason)}{self.members},"logprobs":'.encode()
        if self._logprobs:
            yield b'{"content":['
            yield self._logprobs
            yield b"]}}"
        else:
            yield b"null}"


class ChatAnswer(WholeAnswer):
    """Writes a `ChatCompletion`."""

    kind = "chat.completion"
    choice = ChatChoice

    def __init__(self, identity: Identity, prompt_logprobs: int | None = None) -> None:
        """Begins an answer, with so many likely tokens beside each of the prompt's, or None."""
        super().__init__(identity)
        self._num_bytes += len(identity.prompt_ids) * ID_BYTES
        self._prompt_logprobs = prompt_logprobs
        self._entries = bytearray()  # of `prompt_logprobs`, each behind a comma

    def add(self, chunks: Chunks) -> None:
        """Writes chunks in the order in which they came; see `WholeAnswer.add`."""
        if self._prompt_logprobs is not None:
            before = len(self._entries)
            for chunk in chunks:
                self._entries += prompt_entries(chunk, self._prompt_logprobs)
            self._num_bytes += len(self._entries) - before
        super().add(chunks)

    def rest(self) -> Iterator[bytes | bytearray]:
        """Yields the members behind the usage, each with a comma before it."""
        if self._prompt_logprobs is not None:
            yield b',"prompt_logprobs":[null'
            yield self._entries
            yield b"]"
        elif self._identity.is_openai:
            # vLLM's clients read the member without asking whether it is there.
            yield b',"prompt_logprobs":null'
        if self._identity.returns_ids:
            yield f',"prompt_token_ids":[{id_list(self._identity.prompt_ids)}]'.encode()


def tool_call(call: inference_pb2.ToolCall, index: int, encode: Callable[[str], str]) -> str:
    """Returns a call as JSON: a `ToolCall`.

    Args:
        call: The call.
        index: Its place among the calls of its choice.
        encode: Writes a text as JSON.
    """
    return (
        f'{{"id":{encode(call.id)},"type":"function","index":{index},'
        f'"function":{{"name":{encode(call.name)},"arguments":{encode(call.arguments)}}}}}'
    )


def chat_logprobs(chunk: inference_pb2.GenerateChunk, encode: Callable[[str], str]) -> str:
    """Returns the log-probabilities of a chunk's tokens as JSON: `TokenLogprob`s, by commas.

    Args:
        chunk: A chunk of one choice.
        encode: Writes a text as JSON.
    """
    return ",".join(
        f'{_logprob(token, encode)},"top_logprobs":['
        f"{','.join([_logprob(top, encode) + '}' for top in token.top])}]}}"
        for token in chunk.logprobs
    )


def _logprob(token: inference_pb2.TokenLogprob, encode: Callable[[str], str]) -> str:
    """Returns a `TopLogprob` as JSON, without its last brace."""
    content = token.token
    return (
        f'{{"token":{encode(content.decode("utf-8", "replace"))},"token_id":{token.token_id},'
        f'"logprob":{finite_logprob(token)!r},"bytes":[{",".join(map(str, content))}]'
    )
