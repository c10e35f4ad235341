"""Rules that only OpenAI's API has: its answers' ids, and fields of its clients that we ignore."""

from collections.abc import Collection
from typing import Any

# Beginnings of the ids of answers, for which OpenAI's own .NET package looks.
CHAT_ID_PREFIX = "chatcmpl-"
TEXT_ID_PREFIX = "cmpl-"
RESPONSE_ID_PREFIX = "resp_"
# Beginnings of the paths of OpenAI's and Azure OpenAI's clients.
_PATHS = ("/v1/", "/openai/")


def is_openai_path(path: str) -> bool:
    """Returns whether errors under a path have OpenAI's shape, and not Azure's."""
    return path.startswith(_PATHS) or path == "/responses"  # which no API of Azure's own has


def ignore_unknown(values: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Returns the body as it is: fields outside `known` are ignored by the request's type."""
    return values
