"""The Python client of a model service: `from serving.client import Client, AsyncClient`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.client.client import AsyncClient, Client
    from serving.client.formats import Gbnf, JsonSchema, Lark, OneOf, Regex
    from serving.client.types import Tool

_PLACES = {
    "AsyncClient": "client",
    "Client": "client",
    "Gbnf": "formats",
    "JsonSchema": "formats",
    "Lark": "formats",
    "OneOf": "formats",
    "Regex": "formats",
    "Tool": "types",
}
__all__ = ["AsyncClient", "Client", "Gbnf", "JsonSchema", "Lark", "OneOf", "Regex", "Tool"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"serving.client.{_PLACES[name]}"), name)
