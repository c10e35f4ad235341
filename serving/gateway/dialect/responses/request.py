"""The body of a request to the Responses API as clients send it, and its translation to the proto.

No answer is kept: a client sends the whole conversation each time. Every field of OpenAI's API is
built, means nothing to this server and is taken, or is refused by name; a field that it does not
have is refused too. docs/wire.md has the list.

https://platform.openai.com/docs/api-reference/responses/create
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from serving.gateway.dialect.chat.tools import Choice, add_tools
from serving.gateway.dialect.fields import (
    Described,
    Name,
    Never,
    Parameters,
    StreamOptions,
    Text,
    TokenCount,
    at_most,
    only,
)
from serving.gateway.dialect.forms import Schema
from serving.gateway.dialect.names import Path
from serving.gateway.dialect.responses.items import ITEM_TYPES, Input, conversation
from serving.gateway.dialect.responses.output import check_size
from serving.gateway.dialect.responses.tools import Tools, repeated_choice
from serving.gateway.dialect.whole import LOGPROB_BYTES
from serving.proto import inference_pb2

# Pairs of `metadata`, and the characters of their keys and values, as OpenAI's API allows them.
MAX_METADATA = 16
_MAX_KEY = 64
_MAX_VALUE = 512
_MAX_INCLUDED = 32
_MAX_SETTINGS = 64

Pairs = Annotated[
    dict[Annotated[str, Field(max_length=_MAX_KEY)], Annotated[str, Field(max_length=_MAX_VALUE)]],
    Field(max_length=MAX_METADATA),
    at_most(MAX_METADATA),
]
# Settings that mean nothing here.
Settings = Annotated[
    dict[Name, Text | None], Field(max_length=_MAX_SETTINGS), at_most(_MAX_SETTINGS)
]
# Additions to items; all but the last but one are to items that no answer of ours has.
Included = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]
_LOGPROBS = "message.output_text.logprobs"


class TextFormat(Described):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    """`text`, `json_object` for any JSON object, or `json_schema`."""
    name: Name | None = None
    """Of the schema; means nothing here."""
    description: Text | None = None
    """Of the schema; means nothing here."""
    schema_text: Schema | None = Field(default=None, alias="schema")
    """With `json_schema`: a JSON Schema, draft 2020-12."""
    strict: bool | None = None
    """Refuses the schema if a part of it cannot be enforced. All else is enforced either way."""

    def proto(self) -> inference_pb2.ResponseFormat | None:
        """Returns the form; None for any text."""
        match self.type:
            case "json_schema":
                return inference_pb2.ResponseFormat(
                    json_schema=self.schema_text, strict=bool(self.strict)
                )
            case "json_object":
                return inference_pb2.ResponseFormat(json_object=inference_pb2.JsonObject())
        return None


def _has_schema(form: TextFormat | None) -> TextFormat | None:
    if form is not None and (form.type == "json_schema") != (form.schema_text is not None):
        raise PydanticCustomError(
            "text_format", "a format of type 'json_schema' has a 'schema', and no other has one"
        )
    return form


class TextOptions(Described):
    """Options of the answer's text."""

    format: Annotated[TextFormat | None, AfterValidator(_has_schema)] = None
    """Its form."""
    verbosity: Literal["low", "medium", "high"] | None = None
    """Means nothing to this model."""


class Reasoning(Described):
    """Options of models that reason, which mean nothing to this one."""

    effort: Name | None = None
    """Means nothing here, like the fields that follow."""
    summary: Name | None = None
    """Whether the reasoning is told."""
    generate_summary: Name | None = None
    """The older name for `summary`."""
    context: Name | None = None
    """Earlier reasoning that is read."""
    mode: Name | None = None
    """The way of reasoning."""


class ResponsesStreamOptions(StreamOptions):
    """Options of a stream."""

    include_obfuscation: Annotated[bool | None, only(False)] = None
    """Whether events are filled up to hide the lengths of texts; not supported."""


def _newer_name(value: object) -> object:
    if value is not None:
        raise PydanticCustomError(
            "newer_name", "max_tokens is not a parameter of this API; give max_output_tokens"
        )
    return value


def _with_logprobs(count: int | None, info: ValidationInfo) -> int | None:
    if count and _LOGPROBS not in (info.data.get("include") or ()):
        raise PydanticCustomError(
            "missing", "top_logprobs needs 'message.output_text.logprobs' in include"
        )
    return count


class ResponsesRequest(Parameters):
    """The body of a request to the Responses API."""

    prompt_field = "input"

    input: Input
    """A text of the user, or the items of a conversation in order."""
    instructions: Text | None = None
    """A system message before the input."""
    max_output_tokens: TokenCount | None = None
    """Tokens to generate at most."""
    text: TextOptions | None = None
    """The form of the answer."""
    tools: Tools = None
    """Functions that the model may call."""
    tool_choice: Choice = None
    """`auto`, `none`, `required`, a function, or the functions that are allowed."""
    parallel_tool_calls: bool | None = None
    """Whether an answer may call several functions; true if absent."""
    include: Annotated[list[Included], Field(max_length=_MAX_INCLUDED)] | None = None
    """`message.output_text.logprobs` asks for log-probabilities; the others mean nothing here."""
    top_logprobs: Annotated[
        Annotated[int, Field(ge=0, le=20)] | None, AfterValidator(_with_logprobs)
    ] = None
    """The number of likeliest tokens to return beside each token."""
    metadata: Pairs | None = None
    """The client's own; the answer repeats it."""
    stream_options: ResponsesStreamOptions | None = None
    """Options of a stream."""
    store: Annotated[bool | None, only(False)] = None
    """Whether the answer is kept; only false, which is also what its absence means."""
    truncation: Annotated[Literal["auto", "disabled"] | None, only("disabled")] = None
    """Whether a conversation that is too long is shortened; only `disabled`."""
    background: Annotated[bool | None, only(False)] = None
    """Whether the answer is fetched later; only false."""

    reasoning: Reasoning | None = None
    """Options of models that reason; they mean nothing here, like the fields that follow."""
    max_tool_calls: TokenCount | None = None
    """Calls of tools that the server runs; it runs none."""
    user: Text | None = None
    """The client's name of its user; the answer repeats it."""
    safety_identifier: Text | None = None
    """The newer name for `user`."""
    prompt_cache_key: Text | None = None
    """Means nothing here: what is computed is found by its content."""
    prompt_cache_options: Settings | None = None
    """Means nothing here."""
    prompt_cache_retention: Name | None = None
    """Means nothing here."""
    image: Settings | None = None
    """Options of images, of which there are none."""
    client_metadata: Settings | None = None
    """Codex's notes about itself."""

    previous_response_id: Never = None
    """The id of an answer that is kept; not supported, like the fields that follow."""
    conversation: Never = None
    """The id of a conversation that is kept."""
    prompt: Never = None
    """A prompt that is kept."""
    context_management: Annotated[Any, only([])] = None
    """Shortening of long conversations."""
    moderation: Never = None
    """A check of input and output by another model."""
    access_programs: Never = None
    """Access to models that are not for everybody."""
    background_options: Never = None
    """Options of `background`."""
    n: Annotated[Annotated[int, Field(ge=1, le=128)] | None, only(1)] = None
    """An answer has one choice."""
    max_tokens: Annotated[TokenCount | None, AfterValidator(_newer_name)] = None
    """Not a name of this API."""

    @classmethod
    def place(cls, steps: Path) -> Path:
        """Returns the path of a value in the body; pydantic names the types of items too."""
        if steps[:1] == ("input",) and steps[2:3] and steps[2] in ITEM_TYPES:
            return (*steps[:2], *steps[3:])
        return steps

    def sent_path(self, path: Path) -> Path:
        """Returns the client's path of a parameter, from the path that the service names."""
        match path[:2]:
            case ("response_format", "json_schema"):
                return ("text", "format", "schema")
            case ("response_format", *_):
                return ("text", "format")
            case ("max_tokens", *_):
                return ("max_output_tokens",)
            case ("messages", *_):
                return ("input",)  # several items may be one message
        return super().sent_path(path)

    def protos(self) -> list[inference_pb2.GenerateRequest]:
        """Returns the one call of the model service that answers the request."""
        request = self.without_prompt()
        request.chat.CopyFrom(conversation(self.input, self.instructions))
        add_tools(request.chat, self.tools, self.tool_choice, self.parallel_tool_calls)
        if self.max_output_tokens is not None:
            request.max_tokens = self.max_output_tokens
        if self.text and self.text.format and (form := self.text.format.proto()) is not None:
            request.response_format.CopyFrom(form)
        if _LOGPROBS in (self.include or ()):
            request.top_logprobs = self.top_logprobs or 0
            check_size(request.max_tokens * (1 + request.top_logprobs) * LOGPROB_BYTES)
        return [request]

    def repeated(self) -> dict[str, Any]:
        """Returns the fields of the answer that repeat parameters of the request."""
        form = self.text.format if self.text else None
        is_parallel = self.parallel_tool_calls
        shown = {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": True if is_parallel is None else is_parallel,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "flex" if self.service_tier in ("flex", "batch") else "default",
            "temperature": self.temperature,
            "text": {"format": _repeated_form(form)},
            "tool_choice": repeated_choice(self.tool_choice),
            "tools": [
                tool.model_dump(include={"type", "name", "description", "strict"})
                | {"parameters": json.loads(tool.parameters) if tool.parameters else None}
                for tool in self.tools or ()
            ],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": self.top_p,
        }
        own = ("user", "safety_identifier", "prompt_cache_key")
        return shown | {name: value for name in own if (value := getattr(self, name)) is not None}


def _repeated_form(form: TextFormat | None) -> dict[str, Any]:
    if form is None or form.schema_text is None:
        return {"type": form.type if form else "text"}
    shown = form.model_dump(include={"type", "name", "description", "strict"}, exclude_none=True)
    return shown | {"schema": json.loads(form.schema_text)}
