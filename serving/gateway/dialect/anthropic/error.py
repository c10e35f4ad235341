"""Errors in the shape of Anthropic's API, on its paths.

https://docs.claude.com/en/api/errors
"""

from typing import Literal

from pydantic import Field

from serving.errors import (
    EngineFailure,
    InvalidParameter,
    Problem,
    ServingError,
)
from serving.gateway.dialect.fields import Described, is_none

REQUEST_ID_HEADER = "request-id"
"""Header of answers on these paths, for which Anthropic's clients look."""
REQUEST_ID_PREFIX = "req_"
MESSAGE_ID_PREFIX = "msg_"

ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "request_too_large",
    "timeout_error",
    "rate_limit_error",
    "api_error",
    "overloaded_error",
]
# The path of the field with which the package's loop of calls begins, and goes on without it.
_THREAD = ("body", "thread")
# By status; all others are invalid_request_error.
_TYPES: dict[int, ErrorType] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


class AnthropicErrorCode(Described):
    """A cause of an error that Anthropic's clients can do something about."""

    error_code: Literal["thread_unsupported_request"] = "thread_unsupported_request"
    """Its name."""
    unsupported: list[str] = ["thread"]
    """What is not supported."""


class AnthropicErrorDetail(Described):
    """An error as Anthropic's clients look for it."""

    type: ErrorType
    """The class of errors."""
    message: str
    """What is wrong and what to do; it begins with the place in the body, if there is one."""
    details: AnthropicErrorCode | None = Field(default=None, exclude_if=is_none)
    """Of a refused `thread`: what tells Anthropic's clients to send whole conversations."""


class AnthropicErrorBody(Described):
    """The body of answers that are not 2xx, and of the event `error`, on Anthropic's paths."""

    type: Literal["error"] = "error"
    """Always `error`."""
    error: AnthropicErrorDetail
    """What went wrong."""
    request_id: str | None = None
    """`req_` and the request's id."""


def is_anthropic_path(path: str) -> bool:
    """Returns whether errors under a path have Anthropic's shape."""
    return path == "/v1/messages" or path.startswith(("/v1/messages/", "/anthropic/"))


def anthropic_status(error: ServingError) -> int:
    """Returns the HTTP status on Anthropic's paths, whose API has neither 422 nor 424.

    503 stays, where that API has 529: proxies and load balancers know what to do with it.
    """
    if isinstance(error, InvalidParameter):
        return 400
    return 500 if isinstance(error, EngineFailure) else error.http_status


def anthropic_headers(error: ServingError) -> dict[str, str]:
    """Returns headers of an error that are for Anthropic's clients, which repeat every 500."""
    return {"x-should-retry": "false"} if isinstance(error, EngineFailure) else {}


def anthropic_error(error: ServingError, request_id: str | None = None) -> AnthropicErrorBody:
    """Returns the body that a client of Anthropic's reads when its request failed.

    Args:
        error: The error.
        request_id: The request's id, 32 hexadecimal digits.
    """
    kind = _TYPES.get(anthropic_status(error), "invalid_request_error")
    message, details = str(error), None
    if isinstance(error, InvalidParameter) and error.problems:
        message = "; ".join(map(_sentence, error.problems))
        if any(problem.path == _THREAD for problem in error.problems):
            details = AnthropicErrorCode()
    return AnthropicErrorBody(
        error=AnthropicErrorDetail(type=kind, message=message, details=details),
        request_id=request_id and REQUEST_ID_PREFIX + request_id,
    )


def _sentence(problem: Problem) -> str:
    """Returns a problem behind its place, as in `messages.0.role: Field required`."""
    place = ".".join(problem.path[1:])
    # The service's own sentences begin with a parameter's name.
    is_named = not place or problem.message.startswith(problem.path[1])
    return problem.message if is_named else f"{place}: {problem.message}"
