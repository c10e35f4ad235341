"""Reading of a body: from its bytes to a checked request. Malformed JSON is 400, a wrong value 422.

A refusal shows a bounded amount of the body, whatever was sent: it names a few problems, and
shortens the names that the client chose.
"""

import codecs
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from serving.errors import InvalidParameter, InvalidRequest, Problem, UnsupportedParameter
from serving.gateway.dialect.fields import NOT_SUPPORTED, Body
from serving.gateway.dialect.json_size import check_values
from serving.gateway.dialect.names import Path

# The number of problems that one refusal names.
MAX_PROBLEMS = 10
MAX_NESTING = 200
"""Lists and objects within each other that the parser reads."""
# Characters of a name that the client chose.
_NAME_LENGTH = 100

Request = TypeVar("Request", bound=Body)
# A vendor's rule for fields that its API does not have: from the fields of the body and the names
# that the request's type knows to the fields that are to be read, or an error.
UnknownFields = Callable[[dict[str, Any], Collection[str]], dict[str, Any]]


def read(body: bytes, kind: type[Request], unknown: UnknownFields) -> Request:
    """Returns the request that the bytes of a body hold.

    Args:
        body: JSON.
        kind: The type of the request.
        unknown: The vendor's rule for fields that it does not have.

    Raises:
        InvalidRequest: The body is no JSON object, has too many values, or the vendor's rule
            refuses it.
        InvalidParameter: A field is missing, or its value is wrong.
        UnsupportedParameter: All that is wrong is that it asks for features we do not have.
    """
    check_values(body)
    try:
        # PowerShell, .NET and Java put a byte order mark before UTF-8.
        values = from_json(body.removeprefix(codecs.BOM_UTF8), allow_inf_nan=False)
    except ValueError as error:
        if "recursion limit" in str(error):  # the parser's own
            raise InvalidRequest(
                "the body is nested too deeply; nest lists and objects at most "
                f"{MAX_NESTING} deep, of which a schema may have 100"
            ) from error
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    if not isinstance(values, dict):
        required = [name for name, field in kind.model_fields.items() if field.is_required()]
        named = f" with the key '{required[0]}'" if required else ""
        raise InvalidRequest(f"the body must be a JSON object{named}")
    values = unknown(values, kind.model_fields)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        raise refusal(problems, ("body",), kind.place) from error


def forbidden(names: list[str], values: dict[str, Any]) -> InvalidParameter:
    """Returns the refusal of fields that the model does not know, in the words of Azure's models.

    Args:
        names: The fields' names.
        values: The fields of the body.
    """
    message = "Extra inputs are not permitted"
    return InvalidParameter(
        message,
        [
            Problem("extra_forbidden", ("body", shortened(name)), message, values[name])
            for name in names[:MAX_PROBLEMS]
        ],
    )


def refuse_unknown(values: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Returns the body as it is; raises InvalidParameter for a field that is not `known`."""
    if unknown := [name for name in values if name not in known]:
        raise forbidden(unknown, values)
    return values


def shortened(name: str) -> str:
    """Returns a name that the client chose, cut to a length that an answer can hold."""
    return name if len(name) <= _NAME_LENGTH else f"{name[:_NAME_LENGTH]}..."


def refusal(
    problems: Sequence[Any],
    place: Path = (),
    place_of: Callable[[Path], Path] = lambda steps: steps,
) -> InvalidParameter:
    """Returns the error that names what pydantic has found wrong.

    Args:
        problems: pydantic's list of errors.
        place: The place in the request that their paths begin at, such as ("body",).
        place_of: From the steps that pydantic names to the path behind that place.
    """
    shown = [_problem(details, place, place_of) for details in problems[:MAX_PROBLEMS]]
    is_feature = all(problem.kind == NOT_SUPPORTED for problem in shown)
    kind = UnsupportedParameter if is_feature else InvalidParameter
    return kind("; ".join(problem.message for problem in shown), shown)


def _problem(details: ErrorDetails, place: Path, place_of: Callable[[Path], Path]) -> Problem:
    # Microsoft's own sample code joins the path with dots, so all of it must be text.
    steps = tuple(shortened(str(step)) for step in details["loc"])
    path = (*place, *place_of(steps))
    return Problem(details["type"], path, details["msg"], details["input"])
