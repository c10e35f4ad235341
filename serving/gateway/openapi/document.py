"""The OpenAPI document of the gateway.

The routes read bodies themselves, so the document is made here from the types that they read and
write.
"""

from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serving.accounting.rate_limits import UNITS
from serving.errors import EngineFailure, InvalidParameter, Overloaded
from serving.gateway.answering import MAX_WEAKENED, VIOLATION_HEADER, WEAKENED_HEADER
from serving.gateway.dialect.anthropic.error import (
    REQUEST_ID_HEADER,
    AnthropicErrorBody,
    is_anthropic_path,
)
from serving.gateway.dialect.anthropic.models import AnthropicModel, ModelPage
from serving.gateway.dialect.anthropic.request import CountRequest, MessagesRequest
from serving.gateway.dialect.anthropic.response import MessageObject, TokenCountAnswer
from serving.gateway.dialect.anthropic.stream import MessageEvent
from serving.gateway.dialect.chat.request import ChatRequest
from serving.gateway.dialect.chat.response import ChatCompletion
from serving.gateway.dialect.chat.stream import ChatCompletionChunk
from serving.gateway.dialect.error_body import ErrorBody, OpenAIErrorBody
from serving.gateway.dialect.models import ModelCard, ModelInfo, ModelList
from serving.gateway.dialect.openai import is_openai_path
from serving.gateway.dialect.responses.hosted_tools import IGNORED_HEADER
from serving.gateway.dialect.responses.request import ResponsesRequest
from serving.gateway.dialect.responses.response import ResponseObject
from serving.gateway.dialect.responses.stream import ResponseEvent
from serving.gateway.dialect.text.request import CompletionRequest
from serving.gateway.dialect.text.response import TextCompletion
from serving.gateway.dialect.tokens.request import DetokenizeRequest, TokenizeRequest
from serving.gateway.dialect.tokens.response import DetokenizeAnswer, TokenizeAnswer
from serving.gateway.endpoints.health import Status, Version
from serving.gateway.endpoints.usage import UsageReport
from serving.gateway.routes import (
    AZURE_PREFIXES,
    EMBEDDINGS,
    INFO_PATHS,
    MESSAGES_PATHS,
    MODEL_PATHS,
    OPENAI_PREFIXES,
    PREFIXES,
    RESPONSES_PREFIXES,
)

Schema = dict[str, Any]

_ABOUT = """\
The Azure AI Model Inference API, OpenAI's and Mistral's dialects of it, and Anthropic's Messages
API, for one chat model.

Where a number or a boolean is asked for, a string that holds one is taken too; null means that a
parameter is absent. What is known but not supported is refused by name."""
_ERRORS = {
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
_IGNORED: Schema = {
    IGNORED_HEADER: {
        "description": "Hosted tools that were left out, by --ignore-hosted-tools.",
        "schema": {"type": "string"},
    }
}


def document(root_path: str = "", *, metrics_route: str = "operators") -> Schema:
    """Returns the OpenAPI document.

    Args:
        root_path: The path before all routes; "" for none.
        metrics_route: Who may ask for /metrics; see GatewayConfig.
    """
    servers: Schema = {"servers": [{"url": root_path}]} if root_path else {}
    return servers | {
        "openapi": "3.1.0",
        "info": {
            "title": "mixtral-jax",
            "version": version("mixtral-jax"),
            "description": _ABOUT,
        },
        "security": [{"bearer": []}, {"key": []}, {"anthropic": []}],
        "paths": _chats()
        | _completions()
        | _responses()
        | _messages()
        | _embeddings()
        | _models()
        | _tokens()
        | _metrics(metrics_route)
        | _open(),
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "api-key"},
                "anthropic": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _schemas() -> Schema:
    read: list[type[BaseModel]] = [
        ChatRequest,
        CompletionRequest,
        ResponsesRequest,
        MessagesRequest,
        TokenizeRequest,
        DetokenizeRequest,
        CountRequest,
    ]
    written: list[type[BaseModel]] = [
        ChatCompletion,
        ChatCompletionChunk,
        TextCompletion,
        ResponseObject,
        ResponseEvent,
        MessageObject,
        MessageEvent,
        ModelInfo,
        ModelCard,
        ModelList,
        AnthropicModel,
        ModelPage,
        ErrorBody,
        OpenAIErrorBody,
        AnthropicErrorBody,
        Status,
        Version,
        TokenizeAnswer,
        DetokenizeAnswer,
        TokenCountAnswer,
        UsageReport,
    ]
    modes: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
        *((kind, "validation") for kind in read),
        *((kind, "serialization") for kind in written),
    ]
    _, generated = models_json_schema(modes, ref_template="#/components/schemas/{model}")
    schemas: Schema = generated["$defs"]
    return schemas


def _chats() -> Schema:
    strict = {
        "name": "extra-parameters",
        "in": "header",
        "description": "What happens to parameters that Azure's API does not list. "
        "extra-params is the same header.",
        "schema": {"enum": ["error", "drop", "pass-through"], "default": "error"},
    }
    return {
        f"{prefix}/chat/completions": _post(
            f"{prefix}/chat/completions",
            "Answers a conversation, at once or as a stream.",
            ("ChatRequest", "ChatCompletion", "ChatCompletionChunk"),
            [strict] if prefix in AZURE_PREFIXES else [],
        )
        for prefix in PREFIXES
    }


def _completions() -> Schema:
    return {
        f"{prefix}/completions": _post(
            f"{prefix}/completions",
            "Continues a text, at once or as a stream.",
            ("CompletionRequest", "TextCompletion", "TextCompletion"),
            [],
        )
        for prefix in ("", *OPENAI_PREFIXES)
    }


def _responses() -> Schema:
    paths = {
        f"{prefix}/responses": _post(
            f"{prefix}/responses",
            "Answers a conversation in OpenAI's Responses API, at once or as a stream.",
            ("ResponsesRequest", "ResponseObject", "ResponseEvent"),
            [],
        )
        for prefix in RESPONSES_PREFIXES
    }
    for methods in paths.values():
        answer = methods["post"]["responses"]["200"]
        answer["headers"] = answer["headers"] | _IGNORED
        event = answer["content"]["text/event-stream"]["schema"]["properties"]
        event["data"]["description"] = "ResponseEvent; no [DONE] follows the last one"
    return paths


def _messages() -> Schema:
    paths = {
        path: _post(
            path,
            "Answers a conversation in Anthropic's Messages API, at once or as a stream.",
            ("MessagesRequest", "MessageObject", "MessageEvent"),
            [],
        )
        for path in MESSAGES_PATHS
    }
    for methods in paths.values():
        answer = methods["post"]["responses"]["200"]
        answer["headers"] = answer["headers"] | _IGNORED
        content = answer["content"]
        event = content["text/event-stream"]["schema"]["properties"]
        event["data"]["description"] = "MessageEvent; no [DONE] follows the last one"
    return paths


def _embeddings() -> Schema:
    summary = "Not supported by a chat model: always 404."
    return {
        path: {
            "post": {
                "summary": summary,
                "operationId": _identifier("post", path),
                "parameters": _parameters(path, []),
                "responses": _failures(path, 400, 401, 403, 404, 405, 500, 503),
            }
        }
        for path in (f"{prefix}{name}" for prefix in PREFIXES for name in EMBEDDINGS)
    }


def _models() -> Schema:
    paths = {path: _get(path, "Which model is served.", "ModelInfo") for path in INFO_PATHS}
    paths["/usage"] = _get("/usage", "What the caller has used, by day.", "UsageReport")
    everybody = {
        "name": "all",
        "in": "query",
        "description": "Of every caller; for operators' keys.",
        "schema": {"type": "boolean", "default": False},
    }
    paths["/usage"]["get"]["parameters"].append(everybody)
    paths["/usage"]["get"]["responses"] |= _failures("/usage", 422)
    for path in MODEL_PATHS:
        own = is_anthropic_path(path)  # the others answer so too where `anthropic-version` is sent
        listed = "ModelPage" if own else "ModelList"
        paths[path] = _get(path, "The served model and its adapters.", listed)
        card = f"{path}/{{model_id}}"
        shown = "AnthropicModel" if own else "ModelCard"
        paths[card] = _get(card, "The model of this name.", shown)
        if own:
            paths[path]["get"]["parameters"] += [
                {"name": name, "in": "query", "schema": {"type": kind}}
                for name, kind in (
                    *(("limit", "integer"), ("after_id", "string")),
                    ("before_id", "string"),
                )
            ]
    return paths


def _tokens() -> Schema:
    described = (
        ("/tokenize", "The tokens of a text or a chat.", "TokenizeRequest", "TokenizeAnswer"),
        ("/detokenize", "The text of tokens.", "DetokenizeRequest", "DetokenizeAnswer"),
        *(
            (
                f"{path}/count_tokens",
                "The number of tokens of a conversation, in Anthropic's form.",
                "CountRequest",
                "TokenCountAnswer",
            )
            for path in MESSAGES_PATHS
        ),
    )
    return {
        path: {
            "post": {
                "summary": summary,
                "operationId": _identifier("post", path),
                "parameters": _parameters(path, []),
                "requestBody": {"required": True, "content": _json(_ref(request))},
                "responses": {
                    "200": {
                        "description": "As asked.",
                        "headers": RATE_LIMIT_HEADERS,
                        "content": _json(_ref(answer)),
                    }
                }
                | _failures(path, *(status for status in _ERRORS if status != 424)),
            }
        }
        for path, summary, request, answer in described
    }


def _metrics(route: str) -> Schema:
    if route == "off":
        return {}
    described = _get("/metrics", "The metrics of gateway and service, for Prometheus.", None)
    described["get"]["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    if route == "open":
        described["get"] |= {"security": [], "parameters": []}
    return {"/metrics": described}


def _open() -> Schema:
    """The routes that need no key."""
    paths = {
        "/health/live": _get("/health/live", "200 for as long as the gateway lives.", "Status"),
        "/health/ready": _get("/health/ready", "200 while the model can be asked.", "Status"),
        "/health": _get("/health", "The same as /health/ready; vLLM's and llama.cpp's.", "Status"),
        "/ping": _get("/ping", "The same as /health/ready; SageMaker's.", "Status"),
        "/version": _get("/version", "The version of the server.", "Version"),
        "/openapi.json": _get("/openapi.json", "This document.", None),
        "/docs": _get("/docs", "This document as a page.", None),
        "/": _get("/", "The page to chat with, for a browser.", None),
        "/page/{name}": _get("/page/{name}", "Its scripts, style and icon.", None),
    }
    for methods in paths.values():
        operation = methods["get"]
        operation["security"] = []
        operation["parameters"] = [kept for kept in operation["parameters"] if kept["in"] == "path"]
    for path, kind in (("/docs", "text/html"), ("/", "text/html"), ("/page/{name}", "*/*")):
        paths[path]["get"]["responses"]["200"]["content"] = {kind: {"schema": {"type": "string"}}}
    paths["/ping"]["post"] = paths["/ping"]["get"] | {"operationId": "post_ping"}
    return paths


def _get(path: str, summary: str, answer: str | None) -> Schema:
    schema: Schema = {"type": "object"} if answer is None else _ref(answer)
    answers = {"200": {"description": "As asked.", "content": _json(schema)}}
    return {
        "get": {
            "summary": summary,
            "operationId": _identifier("get", path),
            "parameters": _parameters(path, []),
            "responses": answers | _failures(path, 400, 401, 403, 404, 405, 500, 503),
        }
    }


def _post(path: str, summary: str, types: tuple[str, str, str], parameters: list[Schema]) -> Schema:
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
            "content": _json(_ref(answer)) | {"text/event-stream": {"schema": event}},
        }
    }
    return {
        "post": {
            "summary": summary,
            "operationId": _identifier("post", path),
            "parameters": _parameters(path, parameters),
            "requestBody": {"required": True, "content": _json(_ref(request))},
            "responses": answers | _failures(path, *_ERRORS),
        }
    }


def _parameters(path: str, own: list[Schema]) -> list[Schema]:
    date = {"type": "string", "pattern": r"^(\d{4}-\d{2}-\d{2}(-preview)?|preview|latest)$"}
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


def _failures(path: str, *statuses: int) -> Schema:
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
            "description": _ERRORS[status],
            "headers": headers,
            "content": _json(_ref(body)),
        }
    return answers


def _identifier(method: str, path: str) -> str:
    words = path.replace("{", "").replace("}", "").replace(".", "/").replace("-", "/").split("/")
    return "_".join([method, *filter(None, words)])


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
