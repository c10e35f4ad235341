"""The body of a request to Anthropic's Messages API, and its translation to the proto.

Every field of the API is built, means nothing to this server and is taken, or is refused by name; a
field that it does not have is refused too. docs/wire.md has the list.

https://docs.claude.com/en/api/messages
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from serving.gateway.dialect.anthropic.content import System, Turns, conversation
from serving.gateway.dialect.anthropic.tools import CustomChoice, CustomTools
from serving.gateway.dialect.chat.tools import add_tools
from serving.gateway.dialect.fields import (
    NOT_SUPPORTED,
    Described,
    Harmless,
    Name,
    Never,
    Parameters,
    StopTexts,
    TokenCount,
    only,
)
from serving.gateway.dialect.forms import Schema
from serving.gateway.dialect.names import Path
from serving.proto import inference_pb2

_MAX_EDITS = 16
# Edits of long conversations that are made of every conversation here.
_MADE_ANYWAY = "clear_thinking_"


class JsonOutput(Described):
    """The form of an answer."""

    type: Literal["json_schema"]
    """Always `json_schema`."""
    schema_text: Schema = Field(alias="schema")
    """A JSON Schema, draft 2020-12."""


class OutputConfig(Described):
    """Options of the answer."""

    format: JsonOutput | None = None
    """Its form."""
    effort: Harmless = None
    """Means nothing here: the model was not trained for it."""
    task_budget: Never = None
    """Tokens that a whole task may take; not supported."""


class Thinking(Described):
    """Thinking before the answer, which this model never does."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    """Means nothing here."""
    budget_tokens: Harmless = None
    """Means nothing here."""
    display: Harmless = None
    """Means nothing here."""


class Edit(Described):
    """A way to shorten a long conversation."""

    type: Name
    """`clear_thinking_...`, which is done anyway; all others are refused."""


class ContextManagement(Described):
    """Ways to shorten a long conversation."""

    edits: Annotated[list[Edit], Field(max_length=_MAX_EDITS)] | None = None
    """The ways."""


def _done_anyway(management: ContextManagement | None) -> ContextManagement | None:
    for edit in (management.edits if management else None) or ():
        if not edit.type.startswith(_MADE_ANYWAY):
            raise PydanticCustomError(
                NOT_SUPPORTED,
                "context_management with an edit of type '{kind}' is not supported; leave it out",
                {"kind": edit.type[:40]},
            )
    return management


def _newer_name(value: object) -> object:
    if value is not None:
        raise PydanticCustomError(
            "newer_name", "stop is not a parameter of this API; give stop_sequences"
        )
    return value


def _sole_format(form: JsonOutput | None, info: ValidationInfo) -> JsonOutput | None:
    config = info.data.get("output_config")
    if form is not None and config is not None and config.format is not None:
        raise PydanticCustomError(
            "two_forms",
            "output_config.format and output_format both give the answer's form; leave one out",
        )
    return form


class CountRequest(Parameters):
    """The body of a request that asks for the tokens of a conversation.

    Whatever a request to the Messages API may have is taken: it is the conversation that counts.
    """

    prompt_field = "messages"

    messages: Turns
    """The conversation; where the assistant has the last word, the answer goes on from there."""
    system: System | None = None
    """A system message before the conversation: a text, or blocks of text."""
    temperature: Annotated[float | None, Field(ge=0, le=1)] = None
    """0 takes the likeliest token."""
    stop_sequences: StopTexts | None = None
    """Texts before which the answer ends."""
    tools: CustomTools = None
    """Tools that the model may call."""
    tool_choice: CustomChoice = None
    """Whether tools are called: `auto`, `any`, `tool` or `none`."""
    output_config: OutputConfig | None = None
    """Options of the answer, such as its form."""
    output_format: Annotated[JsonOutput | None, AfterValidator(_sole_format)] = None
    """The older name for `format` in `output_config`."""

    thinking: Thinking | None = None
    """Means nothing here: the model does not think before it answers."""
    cache_control: Harmless = None
    """Means nothing here: computed prefixes are found by their content."""
    metadata: Harmless = None
    """The client's own name of its user, like the two fields that follow."""
    user_profile_id: Harmless = None
    """The client's own."""
    workspace_id: Harmless = None
    """The client's own."""
    speed: Harmless = None
    """Would make the answer faster, not another one."""
    context_management: Annotated[ContextManagement | None, AfterValidator(_done_anyway)] = None
    """Ways to shorten a conversation; only `clear_thinking_...`, which is done anyway."""

    container: Never = None
    """A place in which Anthropic runs code; not supported, like the fields that follow."""
    mcp_servers: Annotated[Any, only([])] = None
    """Servers that Anthropic's would call."""
    inference_geo: Never = None
    """The region in which the answer is computed."""
    diagnostics: Never = None
    """Why a prefix was not found."""
    compaction: Never = None
    """Shortening of long conversations."""
    fallbacks: Annotated[Any, only([])] = None
    """Models that answer in the place of another."""
    fallback_credit_token: Never = None
    """A refund of such an answer."""
    billing_policy: Never = None
    """Who pays."""
    thread: Never = None
    """A conversation that is kept."""
    stream_options: Never = None
    """Options of OpenAI's; a stream of this API always tells the usage."""
    n: Annotated[Annotated[int, Field(ge=1, le=128)] | None, only(1)] = None
    """An answer has one choice."""
    stop: Annotated[StopTexts | None, AfterValidator(_newer_name)] = None
    """Not a name of this API."""

    def sent_path(self, path: Path) -> Path:
        """Returns the client's path of a parameter, from the path that the service names."""
        match path:
            case ("response_format", *_) if self.output_format is not None:
                return ("output_format", "schema")
            case ("response_format", *_):
                return ("output_config", "format", "schema")
            case ("stop", *rest):
                return ("stop_sequences", *rest)
            case ("tools", place, "parameters", *rest):
                return ("tools", place, "input_schema", *rest)
            case ("messages", *_):
                return ("messages",)  # several turns may be one message, and one turn several
        return super().sent_path(path)

    def chat(self) -> inference_pb2.Chat:
        """Returns the conversation with its tools."""
        chat = conversation(self.messages, self.system)
        choice = self.tool_choice
        is_parallel = False if choice and choice.disable_parallel_tool_use else None
        add_tools(chat, self.tools, choice.common() if choice else None, is_parallel)
        return chat


class MessagesRequest(CountRequest):
    """The body of a request to the Messages API."""

    max_tokens: Annotated[TokenCount, Field(ge=1)]
    """Tokens to generate at most."""

    def protos(self) -> list[inference_pb2.GenerateRequest]:
        """Returns the one call of the model service that answers the request."""
        request = self.without_prompt()
        request.chat.CopyFrom(self.chat())
        request.stop.extend(self.stop_sequences or ())
        form = self.output_format or (self.output_config and self.output_config.format)
        if form:
            request.response_format.json_schema = form.schema_text
        return [request]
