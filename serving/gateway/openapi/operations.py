"""The operations of the OpenAPI document: a route's parameters, body, answers and errors."""

from typing import Any

from serving.accounting.rate_limits import UNITS
from serving.errors import EngineFailure, InvalidParameter, Overloaded
from serving.gateway.answering import MAX_WEAKENED, VIOLATION_HEADER, WEAKENED_HEADER
from serving.gateway.dialect.anthropic.error import REQUEST_ID_HEADER, is_anthropic_path
from serving.gateway.dialect.azure import API_VERSION
from serving.gateway.dialect.openai import is_openai_path

Schema = dict[str, Any]

ERRORS = {
    400: "The request is malformed, does not fit the model's context, or, on OpenAI's paths, has a "
    "parameter that is wrong.",
    401: "There is no key or token, or a wrong one.",
    403: "The caller is known, but not allowed here.",
    404: "There is no such route, or no model or adapter of this name.",
    405: "The route exists, the method does not.",
    408: "The body came too slowly, or a deadline passed.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    422: "A parameter's type, range or name is wrong, or it is not supported.",
    424: "The model failed; a retry does not help.",
    429: "The queue is full, or the caller's minute; Retry-After tells how long.",
    500: "The gateway failed.",
    503: "The model is not ready, or not there; Retry-After tells how long.",
}
"""What each status of an error means, for the document."""
_RETRIED = (429, 503)
RATE_LIMIT_HEADERS: Schema = {
    f"x-ratelimit-{name}-{unit}": {
        "description": f"{meaning} of {unit} in a minute; absent where the caller has none.",
        "schema": {"type": kind},
    }
    for unit in UNITS
    for name, meaning, kind in (
        ("limit", "The caller's limit", "integer"),
        ("remaining", "What remains of the caller's limit", "integer"),
        ("reset", "The time, such as 1.5s or 6m0s, until all remains of its limit", "string"),
    )
}
"""Headers of answers that tell a caller's limits, as the document describes them."""

_WEAKENED: Schema = {
    WEAKENED_HEADER: {
        "description": "The parts of schemas without `strict` that could not be enforced, or only "
        "in a weaker form: JSON pointers with their keywords.",
        "schema": {"type": "string", "maxLength": MAX_WEAKENED},
    },
    VIOLATION_HEADER: {
        "description": "How an answer at once misses such a part; absent where it does not.",
        "schema": {"type": "string", "maxLength": MAX_WEAKENED},
    },
}


def get(path: str, summary: str, answer: str | None) -> Schema:
    """Returns a route that is read; `answer` names the type of its answer, None any other."""
    schema: Schema = {"type": "object"} if answer is None else reference(answer)
    answers = {"200": {"description": "As asked.", "content": json_content(schema)}}
    return {
        "get": {
            "summary": summary,
            "operationId": identifier("get", path),
            "parameters": parameters(path, []),
            "responses": answers | failures(path, 400, 401, 403, 404, 405, 500, 503),
        }
    }


def post(path: str, summary: str, types: tuple[str, str, str], own: list[Schema]) -> Schema:
    """Returns a route that answers at once or as a stream.

    Args:
        path: Its path.
        summary: A sentence about it.
        types: The names of the types of its body, its answer at once and its events.
        own: The parameters that only this route has.
    """
    request, answer, chunk = types
    event = {
        "type": "object",
        "description": "An event, which is `data: ` and this.",
        "properties": {"data": {"type": "string", "description": f"{chunk}, or at last [DONE]"}},
        "required": ["data"],
    }
    answers = {
        "200": {
            "description": "The answer; with `stream`, its events as they come.",
            "headers": RATE_LIMIT_HEADERS | _WEAKENED,
            "content": json_content(reference(answer)) | {"text/event-stream": {"schema": event}},
        }
    }
    return {
        "post": {
            "summary": summary,
            "operationId": identifier("post", path),
            "parameters": parameters(path, own),
            "requestBody": {"required": True, "content": json_content(reference(request))},
            "responses": answers | failures(path, *ERRORS),
        }
    }


def parameters(path: str, own: list[Schema]) -> list[Schema]:
    """Returns the parameters of a path: those in it, the version of the API, and its own."""
    date = {"type": "string", "pattern": f"^({API_VERSION})$"}
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in ("name", "model_id")
        if f"{{{name}}}" in path
    ]
    version = {
        "name": "api-version",
        "in": "query",
        "description": "Of Azure's API; any is accepted.",
        "schema": date,
    }
    return [*in_path, version, *own]


def failures(path: str, *statuses: int) -> Schema:
    """Returns the answers of these statuses; those that the path's dialect lacks are left out."""
    is_anthropic = is_anthropic_path(path)
    is_openai = is_openai_path(path)
    body = "OpenAIErrorBody" if is_openai else "ErrorBody"
    elsewhere = {InvalidParameter.http_status} if is_openai or is_anthropic else set()
    if is_anthropic:
        body = "AnthropicErrorBody"
        elsewhere.add(EngineFailure.http_status)
    answers: Schema = {}
    for status in statuses:
        if status in elsewhere:
            continue  # it is another one there
        headers: Schema = {"x-ms-error-code": {"schema": {"type": "string"}}}
        if is_anthropic:
            headers[REQUEST_ID_HEADER] = {"schema": {"type": "string"}}
        if status in _RETRIED:
            headers["retry-after"] = {
                "description": "Seconds until a retry may help.",
                "schema": {"type": "integer"},
            }
            headers["retry-after-ms"] = {
                "description": "The same in milliseconds.",
                "schema": {"type": "integer"},
            }
        if status == Overloaded.http_status:
            headers |= RATE_LIMIT_HEADERS
        answers[str(status)] = {
            "description": ERRORS[status],
            "headers": headers,
            "content": json_content(reference(body)),
        }
    return answers


def identifier(method: str, path: str) -> str:
    """Returns the name of an operation, such as `get_v1_models`."""
    words = path.replace("{", "").replace("}", "").replace(".", "/").replace("-", "/").split("/")
    return "_".join([method, *filter(None, words)])


def json_content(schema: Schema) -> Schema:
    """Returns the content of a body that is JSON."""
    return {"application/json": {"schema": schema}}


def reference(name: str) -> Schema:
    """Returns a reference to a type of the document."""
    return {"$ref": f"#/components/schemas/{name}"}
