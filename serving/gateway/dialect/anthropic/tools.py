"""Tools of Anthropic's API, which stand in a flat form, and the choice among them.

https://docs.claude.com/en/api/messages#body-tools
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from serving.gateway.dialect.chat.tools import FunctionName, Mode, ToolChoice, names_once
from serving.gateway.dialect.fields import (
    MAX_TOOLS,
    NOT_SUPPORTED,
    Described,
    Harmless,
    Name,
    Text,
    only,
)
from serving.gateway.dialect.forms import Schema
from serving.proto import inference_pb2

_MAX_CALLERS = 8
_MODES: dict[str, Mode] = {
    "auto": "auto",
    "any": "required",
    "tool": "required",
    "none": "none",
}


def _check_type(tool: object) -> object:
    """Refuses a tool of Anthropic's before anything else is found wrong with it."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind not in (None, "custom"):
        raise PydanticCustomError(
            NOT_SUPPORTED,
            "tools of type '{kind}' are not supported: this server runs none itself, and its model "
            "was not trained for them; give tools with an input_schema, or have its operator set "
            "--ignore-hosted-tools",
            {"kind": kind[:40] if isinstance(kind, str) else type(kind).__name__},
        )
    return tool


class CustomTool(Described):
    """A tool that the model may call, which the client runs."""

    type: Literal["custom"] | None = None
    """`custom`, or absent."""
    name: FunctionName
    """Letters, digits, `_`, `.` and `-`; given once."""
    description: Text | None = None
    """Tells the model what it does."""
    input_schema: Schema
    """A JSON Schema of its arguments."""
    strict: bool | None = None
    """Refuses the schema if a part of it cannot be enforced. All else is enforced either way."""
    allowed_callers: Annotated[
        Annotated[list[Name], Field(max_length=_MAX_CALLERS)] | None, only([], ["direct"])
    ] = None
    """Who may call it: `direct`, the model."""
    defer_loading: Annotated[bool | None, only(False)] = None
    """Whether the model must search for it first; not supported."""
    input_examples: Annotated[Any, only([])] = None
    """Examples of arguments; not supported."""
    eager_input_streaming: Harmless = None
    """Means nothing here: arguments come as soon as they are whole."""
    cache_control: Harmless = None
    """Means nothing here: computed prefixes are found by their content."""

    def proto(self) -> inference_pb2.Tool:
        """Returns the tool for the service."""
        return inference_pb2.Tool(
            name=self.name,
            description=self.description or "",
            parameters=self.input_schema,
            strict=bool(self.strict),
        )


CustomTools = Annotated[
    Annotated[
        list[Annotated[CustomTool, BeforeValidator(_check_type)]],
        Field(max_length=MAX_TOOLS, fail_fast=True),
    ]
    | None,
    AfterValidator(names_once),
]


class CustomToolChoice(Described):
    """Choice of the tools that are called."""

    type: Literal["auto", "any", "tool", "none"]
    """`auto`: as the model likes; `any`: at least one; `tool`: that of the name; `none`."""
    name: Name | None = None
    """With `tool`: its name."""
    disable_parallel_tool_use: bool | None = None
    """Whether an answer may have one call only."""

    def common(self) -> ToolChoice:
        """Returns the choice in the form that all vendors' are read into."""
        is_named = self.type == "tool"
        allowed = [self.name] if is_named and self.name is not None else []
        return ToolChoice(mode=_MODES[self.type], allowed=allowed, is_named=is_named)


def _known(choice: CustomToolChoice | None, info: ValidationInfo) -> CustomToolChoice | None:
    """Refuses a choice that the tools cannot keep."""
    if choice is None or "tools" not in info.data:  # the tools themselves are refused
        return choice
    names = [tool.name for tool in info.data["tools"] or []]
    if choice.type == "tool" and choice.name is None:
        raise PydanticCustomError("missing", "a choice of type 'tool' needs the tool's name")
    if choice.type == "tool" and choice.name not in names:
        raise PydanticCustomError(
            "unknown_tool",
            "tool_choice names '{name}', which is not among the tools",
            {"name": (choice.name or "")[:100]},
        )
    if choice.type == "any" and not names:
        raise PydanticCustomError(
            "missing", "tool_choice asks for a call, but there are no tools; give tools"
        )
    return choice


CustomChoice = Annotated[CustomToolChoice | None, AfterValidator(_known)]
