"""The parts of this package that are installed by name, and which command needs which of them.

The base install has the library and the commands `chat`, `info` and `keys`; the rest of the
requirements stand in extras, declared in pyproject.toml.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import ParamSpec, TypeVar

from mixtral_jax.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

# The modules by which an extra is known to be installed, as they are imported.
MODULES = {
    "bench": ("grpc", "httpx", "uvicorn"),
    "convert": ("gguf", "huggingface_hub"),
    "train": ("matplotlib", "optax", "tensorboardX", "yaml"),
    "serve": ("fastapi", "grpc", "grpc_health", "prometheus_client", "pydantic", "uvicorn"),
}


class MissingExtraError(UserError):
    """A command whose requirements are not installed."""


def needs(extra: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a command that runs only where `extra`, a key of MODULES, is installed."""

    def decorate(command: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(command)
        def checked(*arguments: P.args, **options: P.kwargs) -> R:
            require(extra)
            return command(*arguments, **options)

        return checked

    return decorate


def require(extra: str) -> None:
    """Raises MissingExtraError if modules of `extra`, a key of MODULES, are not installed."""
    missing = [module for module in MODULES[extra] if find_spec(module) is None]
    if missing:
        raise MissingExtraError(
            f"this command needs {', '.join(missing)}; run pip install 'mixtral-jax[{extra}]'"
        )
