"""The body of every answer that is not 2xx: in OpenAI's shape on OpenAI's paths, else in Azure's.

error_body     ServingError -> ErrorBody, which many clients of Azure's API find their places in
openai_error   ServingError -> OpenAIErrorBody
"""

import json

from serving.errors import (
    ContextTooLong,
    InvalidParameter,
    ModelNotFound,
    Problem,
    ServingError,
    UnsupportedParameter,
)
from serving.gateway.dialect.fields import NOT_SUPPORTED, Described

# A value of a request is shown back in an error if its JSON has no more characters than this.
ECHO_LIMIT = 200


class ErrorDetail(Described):
    """An error as Azure's clients look for it."""

    code: str
    """A name for programs."""
    message: str
    """What is wrong and what to do; JSON itself where the status is 422."""
    status: int
    """The HTTP status."""
    type: str
    """OpenAI's class of errors, such as `authentication_error`."""


class ErrorBody(Described):
    """The body of answers that are not 2xx; one shape for clients that look in other places."""

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


class OpenAIErrorDetail(Described):
    """An error as OpenAI's clients look for it."""

    message: str
    """What is wrong and what to do; it begins with the name of the parameter, if there is one."""
    type: str
    """The class of errors, such as `invalid_request_error`."""
    param: str | None
    """The parameter that is wrong, such as `messages[0].content`."""
    code: str
    """A name for programs."""


class OpenAIErrorBody(Described):
    """The body of answers that are not 2xx, on the paths of OpenAI's clients."""

    error: OpenAIErrorDetail
    """All that is said."""


# Types of errors by status; all others are invalid_request_error, which LiteLLM takes for a mistake
# in the request whatever the status is.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    424: "server_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
# OpenAI's codes of what pydantic finds wrong with a value. All others are invalid_value.
_VALUE_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    NOT_SUPPORTED: UnsupportedParameter.openai_code,
}


def openai_status(error: ServingError) -> int:
    """Returns the HTTP status on OpenAI's paths: 400 where Azure's API has 422."""
    return 400 if isinstance(error, InvalidParameter) else error.http_status


def error_type(error: ServingError) -> str:
    """Returns OpenAI's class of an error."""
    return _TYPES.get(error.http_status, "invalid_request_error")


def openai_error(error: ServingError) -> OpenAIErrorBody:
    """Returns the body that a client of OpenAI's reads when its request failed.

    https://platform.openai.com/docs/guides/error-codes
    """
    kind = error_type(error)
    message, param, code = str(error), None, error.openai_code
    if isinstance(error, ContextTooLong | ModelNotFound):
        param = error.parameter
    if isinstance(error, InvalidParameter) and error.problems:
        param, code = _parameter(error.problems[0]), _code(error)
        message = "; ".join(map(_sentence, error.problems))
    return OpenAIErrorBody(
        error=OpenAIErrorDetail(message=message, type=kind, param=param, code=code)
    )


def _code(error: InvalidParameter) -> str:
    if isinstance(error, UnsupportedParameter):
        return error.openai_code
    kind = error.problems[0].kind
    if kind.endswith(("_type", "_parsing")):
        return "invalid_type"
    return _VALUE_CODES.get(kind, error.openai_code)


def _parameter(problem: Problem) -> str | None:
    """Returns the path of a parameter as OpenAI writes it: messages[0].content."""
    name = ""
    for step in problem.path[1:]:
        name += f"[{step}]" if step.isdecimal() else f".{step}"
    return name.removeprefix(".") or None


def _sentence(problem: Problem) -> str:
    name = _parameter(problem)
    # The service's own sentences begin with a parameter's name.
    top = (name or "").partition("[")[0].partition(".")[0]
    is_named = name is None or problem.message.startswith(top)
    return problem.message if is_named else f"{name}: {problem.message}"


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
    inner = ErrorDetail(
        code=error.azure_code, message=message, status=error.http_status, type=error_type(error)
    )
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
