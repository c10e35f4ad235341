"""Rules that only OpenAI's API has: its clients, and Mistral's, send fields that we ignore."""

from collections.abc import Collection
from typing import Any


def ignore_unknown(values: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Returns the body as it is: fields outside `known` are ignored by the request's type."""
    return values
