"""Tools of the Responses API: functions, which stand in a flat form, and the choice among them.

https://platform.openai.com/docs/api-reference/responses/create#responses-create-tools
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from serving.gateway.dialect.chat.tools import FunctionName, ToolChoice, names_once
from serving.gateway.dialect.fields import (
    MAX_TOOLS,
    NOT_SUPPORTED,
    Described,
    Name,
    Text,
    only,
)
from serving.gateway.dialect.forms import Schema
from serving.proto import inference_pb2

_MAX_CALLERS = 8


def _check_type(tool: object) -> object:
    """Refuses a tool that is no function before anything else is found wrong with it."""
    kind = tool.get("type", "function") if isinstance(tool, dict) else "function"
    if kind != "function":
        raise PydanticCustomError(
            NOT_SUPPORTED,
            "tools of type '{kind}' are not supported: this server runs none itself; give "
            "functions, or have its operator set --ignore-hosted-tools",
            {"kind": kind[:40] if isinstance(kind, str) else type(kind).__name__},
        )
    return tool


class FunctionTool(Described):
    """A function that the model may call."""

    type: Literal["function"]
    """Always `function`."""
    name: FunctionName
    """Letters, digits, `_`, `.` and `-`; given once."""
    description: Text | None = None
    """Tells the model what it does."""
    parameters: Schema | None = None
    """A JSON Schema of its arguments; null: there are none."""
    strict: bool | None = None
    """Refuses the schema if a part of it cannot be enforced. All else is enforced either way."""
    allowed_callers: Annotated[
        Annotated[list[Name], Field(max_length=_MAX_CALLERS)] | None, only([], ["direct"])
    ] = None
    """Who may call it: `direct`, the model."""
    defer_loading: Annotated[bool | None, only(False)] = None
    """Whether the model must search for it first; not supported."""
    is_async: Annotated[bool | None, only(False)] = Field(default=None, alias="async")
    """Whether the model goes on before the output is there; not supported."""
    output_schema: Schema | None = None
    """Means nothing here: the model is not told what an output looks like."""

    def proto(self) -> inference_pb2.Tool:
        """Returns the tool for the service."""
        return inference_pb2.Tool(
            name=self.name,
            description=self.description or "",
            parameters=self.parameters or "",
            strict=bool(self.strict),
        )


Tools = Annotated[
    Annotated[
        list[Annotated[FunctionTool, BeforeValidator(_check_type)]],
        Field(max_length=MAX_TOOLS, fail_fast=True),
    ]
    | None,
    AfterValidator(names_once),
]


def repeated_choice(choice: ToolChoice | None) -> str | dict[str, Any]:
    """Returns a choice as an answer of the API repeats it."""
    if choice is None:
        return "auto"
    named = [{"type": "function", "name": name} for name in choice.allowed]
    if choice.is_named:
        return named[0]
    if named:
        return {"type": "allowed_tools", "mode": choice.mode, "tools": named}
    return choice.mode
