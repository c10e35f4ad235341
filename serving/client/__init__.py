"""The Python client of a model service: `from serving.client import Client, AsyncClient`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.client.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("serving.client.client"), name)
