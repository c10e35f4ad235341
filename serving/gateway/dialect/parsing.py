"""From the bytes of a body to a checked request: malformed JSON is 400, a wrong value 422.

What a refusal shows of the body is bounded, whatever was sent: it names a few problems, and
shortens the names that the client chose.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from serving.errors import InvalidParameter, InvalidRequest, Problem, UnsupportedParameter
from serving.gateway.dialect.fields import NOT_HAD

# Problems that one refusal names.
MAX_PROBLEMS = 10
# Characters of a name that the client chose.
_NAME_LENGTH = 100

Request = TypeVar("Request", bound=BaseModel)


def json_object(body: bytes, required: str) -> dict[str, Any]:
    """The object that a body holds; raises InvalidRequest for anything else."""
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidRequest(f"the body must be a JSON object with the key '{required}'")
    return values


def checked(kind: type[Request], values: dict[str, Any]) -> Request:
    """The request that the values make; raises InvalidParameter or UnsupportedParameter."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        raise refusal(found, ("body",)) from error


def forbidden(names: list[str], values: dict[str, Any]) -> InvalidParameter:
    """The refusal of parameters that the model does not know, in the words of Azure's models."""
    message = "Extra inputs are not permitted"
    return InvalidParameter(
        message,
        [
            Problem("extra_forbidden", ("body", shortened(name)), message, values[name])
            for name in names[:MAX_PROBLEMS]
        ],
    )


def shortened(name: str) -> str:
    """A name that the client chose, of a length that an answer can hold."""
    return name if len(name) <= _NAME_LENGTH else f"{name[:_NAME_LENGTH]}..."


def refusal(found: Sequence[Any], place: tuple[str, ...] = ()) -> InvalidParameter:
    """The error that names what pydantic found wrong at a place of the request."""
    problems = [_problem(details, place) for details in found[:MAX_PROBLEMS]]
    is_feature = all(problem.kind == NOT_HAD for problem in problems)
    leaf = UnsupportedParameter if is_feature else InvalidParameter
    return leaf("; ".join(problem.message for problem in problems), problems)


def _problem(details: ErrorDetails, place: tuple[str, ...]) -> Problem:
    # Upstream's own sample code joins the path with dots, so all of it must be text.
    path = (*place, *(shortened(str(step)) for step in details["loc"]))
    return Problem(details["type"], path, details["msg"], details["input"])
