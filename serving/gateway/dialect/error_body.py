"""The body of every answer that is not 2xx, in one shape for all clients.

error_body   ServingError -> ErrorBody
"""

import json

from serving.errors import InvalidParameter, Problem, ServingError
from serving.gateway.dialect.fields import Described

# A value of a request is shown back in an error if its JSON has no more characters than this.
ECHO_LIMIT = 200


class ErrorDetail(Described):
    """An error as Azure's and OpenAI's clients look for it."""

    code: str
    """A name for programs."""
    message: str
    """What is wrong and what to do; JSON itself where the status is 422."""
    status: int
    """The HTTP status."""


class ErrorBody(Described):
    """The body of every answer that is not 2xx; one shape for clients that look in other places."""

    error: ErrorDetail
    """Where most clients look."""
    status: int
    """The HTTP status."""
    code: str
    """The code again, for clients that look at the root."""
    message: str
    """The message again."""
    detail: str | list[dict[str, object]]
    """The message, or for 422 what is wrong with each parameter: `type`, `loc`, `msg`, `input`."""


def error_body(error: ServingError) -> ErrorBody:
    """Returns the body that a client reads when its request failed."""
    message = str(error)
    detail: str | list[dict[str, object]] = message
    if isinstance(error, InvalidParameter):
        problems = error.problems or (Problem(error.azure_code, ("body",), message, None),)
        detail = [
            {
                "type": problem.kind,
                "loc": list(problem.path),
                "msg": problem.message,
                "input": _echo(problem.value),
            }
            for problem in problems
        ]
        # LiteLLM reads the names of the parameters that it may drop out of the message.
        message = json.dumps({"detail": detail})
    inner = ErrorDetail(code=error.azure_code, message=message, status=error.http_status)
    return ErrorBody(error=inner, **inner.model_dump(), detail=detail)


def _echo(value: object) -> object:
    """Returns a value of the request if it is short enough to be shown, else None."""
    if _room_behind(value, ECHO_LIMIT) < 0:
        return None
    try:
        return value if len(json.dumps(value, allow_nan=False)) <= ECHO_LIMIT else None
    except ValueError:  # infinity, or an integer too long to be written
        return None


def _room_behind(value: object, room: int) -> int:
    """Returns what is left of `room` characters behind a value's JSON, at most; stops below 0."""
    if isinstance(value, str):
        return room - len(value)
    if isinstance(value, (list, dict)):
        members = (
            (item for pair in value.items() for item in pair) if isinstance(value, dict) else value
        )
        for member in members:
            room = _room_behind(member, room - 1)
            if room < 0:
                break
    return room
