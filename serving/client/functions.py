"""Python functions as tools: their schema by pydantic, and their calls.

pydantic is imported by the first function that is given.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving.client.types import Tool


@dataclass(frozen=True)
class Arguments:
    """Arguments of a call that fit the function."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]


class Function:
    """A Python function that the model may call.

    Its name, its docstring and its signature are what the model reads of it. Parameters may be
    annotated with whatever pydantic knows, such as `Annotated[int, Field(ge=0)]`.

    Args:
        function: The function, a method, or one that is to be awaited.

    Raises:
        TypeError: Its signature has no JSON Schema, or it has no name.
        ImportError: pydantic is not installed.

    Attributes:
        function: The function.
        tool: The tool as the model reads it.
        is_async: Whether its result is to be awaited.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        try:
            from pydantic import PydanticUserError, TypeAdapter
        except ImportError:
            raise ImportError(
                "a function as a tool needs pydantic: pip install pydantic, or give a Tool"
            ) from None
        if not callable(function):
            raise TypeError(f"a tool cannot be {function!r:.60}; give a function or a Tool")
        name = getattr(function, "__name__", "")
        if not name or name == "<lambda>":
            raise TypeError(f"a tool needs a name; give a function with one, not {function!r:.60}")
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
                raise TypeError(
                    f"{name} takes {parameter.name} by its place alone, and a model gives names; "
                    "let it be given by name"
                )

        @functools.wraps(function)
        def arguments(*positional: Any, **named: Any) -> Arguments:
            return Arguments(positional, named)

        try:
            # Here, for pydantic would look up names in the module of `arguments`.
            arguments.__annotations__ = typing.get_type_hints(function, include_extras=True)
            adapter: Any = TypeAdapter  # whose types know of no functions
            self._adapter = adapter(arguments)
            parameters = self._adapter.json_schema()
        except (PydanticUserError, NameError) as error:
            raise TypeError(f"the signature of {name} has no JSON Schema: {error}") from error
        self.function = function
        self.is_async = inspect.iscoroutinefunction(function)
        description = inspect.getdoc(function) or ""
        self.tool = Tool(name=name, description=description, parameters=parameters)

    def read(self, arguments: str) -> Arguments:
        """Returns the arguments of a call, checked; raises ValueError if they do not fit."""
        read: Arguments = self._adapter.validate_json(arguments)
        return read

    def run(self, arguments: Arguments) -> Any:
        """Returns what the function returns, or what is to be awaited for it."""
        return self.function(*arguments.positional, **arguments.named)


def tools_of(given: Sequence[Tool | Callable[..., Any]]) -> list[Tool]:
    """Returns tools as the model reads them; raises TypeError for what is none."""
    return [tool if isinstance(tool, Tool) else Function(tool).tool for tool in given]


def result_text(result: Any) -> str:
    """Returns a function's result as the model reads it: a text as it is, all else as JSON.

    Raises TypeError for what has no JSON.
    """
    if isinstance(result, str):
        return result
    from pydantic_core import PydanticSerializationError, to_json

    try:
        return to_json(result).decode()
    except PydanticSerializationError as error:
        raise TypeError(f"the result of a tool has no JSON: {error}") from error
