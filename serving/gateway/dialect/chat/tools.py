"""Tools of a chat: the functions that the model may call, and which of them it must.

https://platform.openai.com/docs/guides/function-calling
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from serving.gateway.dialect.fields import MAX_TOOLS, NOT_SUPPORTED, Described, Name, Text
from serving.gateway.dialect.forms import Schema
from serving.proto import inference_pb2

# Characters of the name of a function.
MAX_FUNCTION_NAME = 64

FunctionName = Annotated[
    str, Field(min_length=1, max_length=MAX_FUNCTION_NAME, pattern=r"^[a-zA-Z0-9_.-]+$")
]


class Function(Described):
    """A function that the model may call."""

    name: FunctionName
    """Letters, digits, `_`, `.` and `-`; given once."""
    description: Text | None = None
    """Tells the model what it does."""
    parameters: Schema | None = None
    """A JSON Schema of its arguments; absent: there are none."""
    strict: bool | None = None
    """Refuses the schema if a part of it cannot be enforced. All else is enforced either way."""


def _tool_type(kind: object) -> object:
    if isinstance(kind, str) and kind != "function":
        raise PydanticCustomError(
            NOT_SUPPORTED,
            "tools of type '{kind}' are not supported; give functions",
            {"kind": kind[:40]},
        )
    return "function" if kind is None else kind


class Tool(Described):
    """A tool that the model may call: a function."""

    type: Annotated[
        Literal["function"],
        BeforeValidator(_tool_type, json_schema_input_type=Literal["function"] | None),
    ] = "function"
    """Always `function`."""
    function: Function
    """The function."""
    strict: bool | None = None
    """LangChain's place for the function's `strict`."""

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.function.name

    def proto(self) -> inference_pb2.Tool:
        """Returns the tool for the service."""
        function = self.function
        return inference_pb2.Tool(
            name=function.name,
            description=function.description or "",
            parameters=function.parameters or "",
            strict=bool(function.strict or self.strict),
        )


class CallableTool(Protocol):
    """A tool that the model may call, in whichever form an API has it."""

    @property
    def name(self) -> str:
        """The name of the function."""

    def proto(self) -> inference_pb2.Tool:
        """Returns the tool for the service."""


Given = TypeVar("Given", bound=Sequence[CallableTool])


def names_once(tools: Given | None) -> Given | None:
    """Returns the tools; refuses two of the same name."""
    seen = set()
    for tool in tools or ():
        if tool.name in seen:
            raise PydanticCustomError(
                "two_tools", "there are two tools with the name '{name}'", {"name": tool.name}
            )
        seen.add(tool.name)
    return tools


Tools = Annotated[
    Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None,
    AfterValidator(names_once),
]
Mode = Literal["auto", "none", "required"]
_MODES: dict[Mode, inference_pb2.ToolChoice.Mode] = {
    "auto": inference_pb2.ToolChoice.MODE_AUTO,
    "none": inference_pb2.ToolChoice.MODE_NONE,
    "required": inference_pb2.ToolChoice.MODE_REQUIRED,
}


class ToolChoice(Described):
    """The tools that may or must be called; all vendors' forms are read into this one."""

    mode: Mode
    """Whether it may, must not or must call one."""
    allowed: Annotated[list[Name], Field(max_length=MAX_TOOLS)] = []
    """Names of the functions that it may call; none: all."""
    is_named: bool = False
    """Whether a single function was named, which is called once."""


def _choice(value: object) -> object:
    """Reads the forms that a choice may have; what is none of them becomes a refusal."""
    if isinstance(value, str):
        return {"mode": "required" if value == "any" else value}
    if not isinstance(value, dict):
        return value
    kind = value.get("type", "function")
    if kind == "allowed_tools":
        inner = value.get("allowed_tools", value)  # Azure's newer API has it without an inner one
        tools = inner.get("tools") if isinstance(inner, dict) else None
        if not isinstance(tools, list) or not 0 < len(tools) <= MAX_TOOLS:
            raise PydanticCustomError(
                "allowed_tools",
                "allowed_tools needs a mode and 1 to 128 tools, such as "
                "{'type': 'function', 'function': {'name': ...}}",
            )
        return {"mode": inner.get("mode", "auto"), "allowed": [_name_of(tool) for tool in tools]}
    if kind != "function":
        raise PydanticCustomError(
            NOT_SUPPORTED,
            "tool_choice of type '{kind}' is not supported; name a function",
            {"kind": kind[:40] if isinstance(kind, str) else type(kind).__name__},
        )
    return {"mode": "required", "allowed": [_name_of(value)], "is_named": True}


def _name_of(tool: object) -> object:
    """Returns the name in {"type": "function", "function": {"name"}}, or without the inner one."""
    if isinstance(tool, dict):
        inner = tool.get("function", tool)
        if isinstance(inner, dict) and isinstance(inner.get("name"), str):
            return inner["name"]
    raise PydanticCustomError(
        "missing", "a function is named like {'type': 'function', 'function': {'name': ...}}"
    )


def _known(choice: ToolChoice | None, info: ValidationInfo) -> ToolChoice | None:
    """Refuses a choice that the tools cannot keep."""
    if choice is None or "tools" not in info.data:  # the tools themselves are refused
        return choice
    names = [tool.name for tool in info.data["tools"] or []]
    for name in choice.allowed:
        if name not in names:
            raise PydanticCustomError(
                "unknown_tool",
                "tool_choice names '{name}', which is not among the tools",
                {"name": name[:100]},
            )
    if choice.mode == "required" and not names:
        raise PydanticCustomError(
            "missing", "tool_choice asks for a call, but there are no tools; give tools"
        )
    return choice


Choice = Annotated[
    Annotated[
        ToolChoice | None,
        BeforeValidator(_choice, json_schema_input_type=str | dict[str, Any] | None),
    ],
    AfterValidator(_known),
]


def add_tools(
    chat: inference_pb2.Chat,
    tools: Sequence[CallableTool] | None,
    choice: ToolChoice | None,
    is_parallel: bool | None,
) -> None:
    """Writes the tools of a request into its chat; nothing if there are none.

    Args:
        chat: The chat.
        tools: The tools.
        choice: Whether they are called; None: as the model likes.
        is_parallel: Whether an answer may call several; None: it may, unless one was named.
    """
    if not tools:
        return
    chat.tools.extend(tool.proto() for tool in tools)
    if choice is not None:
        chat.tool_choice.mode = _MODES[choice.mode]
        chat.tool_choice.allowed.extend(choice.allowed)
        if choice.is_named:
            is_parallel = False
    if is_parallel is not None:
        chat.parallel_tool_calls = is_parallel
