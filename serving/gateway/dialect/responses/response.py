"""An answer of the Responses API at once.

ResponsesAnswer   GenerateChunks, as they come -> the JSON of a ResponseObject

https://platform.openai.com/docs/api-reference/responses/object
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from serving.gateway.dialect.chat.response import TokenLogprob
from serving.gateway.dialect.chunks import Chunks, Identity
from serving.gateway.dialect.fields import Described, is_none
from serving.gateway.dialect.responses.output import Encode, Output, has_text
from serving.gateway.dialect.whole import encode
from serving.proto import inference_pb2

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(Described):
    """The text of a message."""

    type: Literal["output_text"] = "output_text"
    """Always `output_text`."""
    annotations: list[None] = Field(default=[], max_length=0)
    """Always empty: nothing is cited."""
    logprobs: list[TokenLogprob]
    """Log-probabilities of its tokens, where they were asked for."""
    text: str
    """The text."""


class OutputMessage(Described):
    """A message of the model."""

    id: str
    """An id beginning with `msg_`."""
    type: Literal["message"] = "message"
    """Always `message`."""
    status: Status
    """`incomplete` where the answer was cut."""
    role: Literal["assistant"] = "assistant"
    """Always `assistant`."""
    content: list[OutputText]
    """One part."""


class OutputFunctionCall(Described):
    """A call of a function, which the client is to run."""

    id: str
    """An id beginning with `fc_`."""
    type: Literal["function_call"] = "function_call"
    """Always `function_call`."""
    status: Status
    """Always `completed`: a call that was cut is left out."""
    arguments: str
    """JSON."""
    call_id: str
    """The id that the call's output names."""
    name: str
    """The name of the function."""


class InputTokensDetails(Described):
    """Kinds of the input's tokens."""

    cached_tokens: int
    """Tokens that an earlier prompt of the caller had computed."""
    cache_write_tokens: Literal[0] = 0
    """Always 0: nobody pays for what is kept."""


class OutputTokensDetails(Described):
    """Kinds of the output's tokens."""

    reasoning_tokens: Literal[0] = 0
    """Always 0."""


class ResponseUsage(Described):
    """Tokens spent."""

    input_tokens: int
    """Tokens of the rendered conversation."""
    input_tokens_details: InputTokensDetails
    """Kinds of them."""
    output_tokens: int
    """Tokens generated."""
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    """Kinds of them."""
    total_tokens: int
    """The sum of both."""


class IncompleteDetails(Described):
    """Why an answer was cut."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"
    """`max_output_tokens` was reached, or the end of the context."""


class ResponseFailure(Described):
    """Why an answer broke off."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    """A name for programs."""
    message: str
    """What went wrong."""


class ResponseObject(Described):
    """An answer of the Responses API, with the parameters of its request."""

    id: str
    """`resp_` and 32 hexadecimal digits."""
    object: Literal["response"] = "response"
    """Always `response`."""
    created_at: int
    """Seconds since 1970."""
    status: Status
    """`incomplete` where the answer was cut."""
    model: str
    """The name of the served model, whatever name was asked for."""
    error: ResponseFailure | None = None
    """Why the answer broke off."""
    incomplete_details: IncompleteDetails | None = None
    """Why the answer was cut."""
    store: Literal[False] = False
    """Always false: no answer is kept."""
    background: Literal[False] = False
    """Always false."""
    previous_response_id: None = None
    """Always null: no answer is kept."""
    truncation: Literal["disabled"] = "disabled"
    """Always `disabled`."""
    instructions: str | None
    """As in the request, like the fields that follow."""
    max_output_tokens: int | None
    """Tokens to generate at most."""
    metadata: dict[str, str]
    """The client's own."""
    parallel_tool_calls: bool
    """Whether the answer may hold several calls."""
    reasoning: dict[str, None]
    """All null: the model does not reason."""
    service_tier: Literal["default", "flex"]
    """`flex` where the request waits for others."""
    temperature: float | None
    """Null: the server's."""
    text: dict[str, Any]
    """The form of the answer."""
    tool_choice: str | dict[str, Any]
    """Whether functions are called."""
    tools: list[dict[str, Any]]
    """Functions that the model may call."""
    top_logprobs: int
    """The number of likeliest tokens beside each token."""
    top_p: float | None
    """Null: 1."""
    user: str | None = Field(default=None, exclude_if=is_none)
    """The client's own, like the two that follow."""
    safety_identifier: str | None = Field(default=None, exclude_if=is_none)
    """The client's own."""
    prompt_cache_key: str | None = Field(default=None, exclude_if=is_none)
    """The client's own."""
    output: list[OutputMessage | OutputFunctionCall]
    """A message, calls of functions, or both."""
    usage: ResponseUsage | None
    """Tokens spent; null until the answer has ended."""


class ResponseWriter:
    """Writes a `ResponseObject` of whatever status.

    Args:
        identity: The fields of the answer that are known before.
        repeated: The fields that repeat parameters of the request.
        encode: Writes a text as JSON.
    """

    def __init__(self, identity: Identity, repeated: Mapping[str, object], encode: Encode) -> None:
        self.output = Output(identity.id, encode)
        self._head = (
            f'{{"id":{encode(identity.id)},"object":"response","created_at":{identity.created},'
            f'"model":{encode(identity.model)},"status":'
        )
        fixed = {
            "store": False,
            "background": False,
            "previous_response_id": None,
            "truncation": "disabled",
        }
        is_ascii = encode is json.dumps
        self._repeated = json.dumps(
            fixed | dict(repeated), ensure_ascii=is_ascii, separators=(",", ":")
        )[1:-1]

    def written(self, status: Status, usage: str = "null", error: str = "null") -> str:
        """Returns the answer as it is now.

        Args:
            status: Its status.
            usage: A `ResponseUsage` as JSON.
            error: A `ResponseFailure` as JSON.
        """
        cut = '{"reason":"max_output_tokens"}' if status == "incomplete" else "null"
        within = "incomplete" if status == "failed" else status
        return (
            f'{self._head}"{status}","error":{error},"incomplete_details":{cut},{self._repeated},'
            f'"output":[{self.output.written(within)}],"usage":{usage}}}'
        )


class ResponsesAnswer:
    """Writes a `ResponseObject` at once.

    Args:
        identity: The fields of the answer that are known before.
        repeated: The fields that repeat parameters of the request.
    """

    def __init__(self, identity: Identity, repeated: Mapping[str, object]) -> None:
        self._writer = ResponseWriter(identity, repeated, encode)
        self._usage = "null"
        self._status: Status = "completed"

    def add(self, chunks: Chunks) -> None:
        """Writes chunks in the order in which they came.

        Raises:
            InvalidRequest: The answer has more bytes than an answer at once may have.
        """
        output = self._writer.output
        for chunk in chunks:
            if has_text(chunk):
                (output.message or output.begin_message()).add(chunk)
            for call in chunk.tool_calls:
                output.add_call(call)
            if chunk.finish_reason:
                self._status = status_of(chunk)
                if not output.items:
                    output.begin_message()
            if chunk.HasField("usage"):
                self._usage = usage_of(chunk).model_dump_json()
        output.check_size()

    def pieces(self) -> Iterator[bytes | bytearray]:
        """Yields the whole answer as JSON; call it when all chunks have been added."""
        yield self._writer.written(self._status, self._usage).encode()


def status_of(chunk: inference_pb2.GenerateChunk) -> Status:
    """Returns the status of an answer that ends with a chunk."""
    is_cut = chunk.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    return "incomplete" if is_cut else "completed"


def usage_of(chunk: inference_pb2.GenerateChunk) -> ResponseUsage:
    """Returns the tokens spent, which the last chunk of an answer carries."""
    spent = chunk.usage
    return ResponseUsage(
        input_tokens=spent.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=spent.cached_tokens),
        output_tokens=spent.completion_tokens,
        total_tokens=spent.prompt_tokens + spent.completion_tokens,
    )
