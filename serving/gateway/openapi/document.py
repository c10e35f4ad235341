"""The OpenAPI document of the gateway.

The routes read bodies themselves, so the document is made here from the types that they read and
write.
"""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serving.gateway.dialect.anthropic.error import (
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
from serving.gateway.openapi.operations import (
    ERRORS,
    RATE_LIMIT_HEADERS,
    Schema,
    failures,
    get,
    identifier,
    json_content,
    parameters,
    post,
    reference,
)
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

_ABOUT = """\
The Azure AI Model Inference API, OpenAI's and Mistral's dialects of it, and Anthropic's Messages
API, for one chat model.

Where a number or a boolean is asked for, a string that holds one is taken too; null means that a
parameter is absent. What is known but not supported is refused by name."""
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
        f"{prefix}/chat/completions": post(
            f"{prefix}/chat/completions",
            "Answers a conversation, at once or as a stream.",
            ("ChatRequest", "ChatCompletion", "ChatCompletionChunk"),
            [strict] if prefix in AZURE_PREFIXES else [],
        )
        for prefix in PREFIXES
    }


def _completions() -> Schema:
    return {
        f"{prefix}/completions": post(
            f"{prefix}/completions",
            "Continues a text, at once or as a stream.",
            ("CompletionRequest", "TextCompletion", "TextCompletion"),
            [],
        )
        for prefix in ("", *OPENAI_PREFIXES)
    }


def _responses() -> Schema:
    return _with_named_events(
        [f"{prefix}/responses" for prefix in RESPONSES_PREFIXES],
        "Answers a conversation in OpenAI's Responses API, at once or as a stream.",
        ("ResponsesRequest", "ResponseObject", "ResponseEvent"),
    )


def _messages() -> Schema:
    return _with_named_events(
        MESSAGES_PATHS,
        "Answers a conversation in Anthropic's Messages API, at once or as a stream.",
        ("MessagesRequest", "MessageObject", "MessageEvent"),
    )


def _with_named_events(paths: Sequence[str], summary: str, types: tuple[str, str, str]) -> Schema:
    """Returns routes whose streams end with an event of a name, and which may have hosted tools."""
    described = {path: post(path, summary, types, []) for path in paths}
    for methods in described.values():
        answer = methods["post"]["responses"]["200"]
        answer["headers"] = answer["headers"] | _IGNORED
        event = answer["content"]["text/event-stream"]["schema"]["properties"]
        event["data"]["description"] = f"{types[2]}; no [DONE] follows the last one"
    return described


def _embeddings() -> Schema:
    summary = "Not supported by a chat model: always 404."
    return {
        path: {
            "post": {
                "summary": summary,
                "operationId": identifier("post", path),
                "parameters": parameters(path, []),
                "responses": failures(path, 400, 401, 403, 404, 405, 500, 503),
            }
        }
        for path in (f"{prefix}{name}" for prefix in PREFIXES for name in EMBEDDINGS)
    }


def _models() -> Schema:
    paths = {path: get(path, "Which model is served.", "ModelInfo") for path in INFO_PATHS}
    paths["/usage"] = get("/usage", "What the caller has used, by day.", "UsageReport")
    everybody = {
        "name": "all",
        "in": "query",
        "description": "Of every caller; for operators' keys.",
        "schema": {"type": "boolean", "default": False},
    }
    paths["/usage"]["get"]["parameters"].append(everybody)
    paths["/usage"]["get"]["responses"] |= failures("/usage", 422)
    for path in MODEL_PATHS:
        own = is_anthropic_path(path)  # the others answer so too where `anthropic-version` is sent
        listed = "ModelPage" if own else "ModelList"
        paths[path] = get(path, "The served model and its adapters.", listed)
        card = f"{path}/{{model_id}}"
        shown = "AnthropicModel" if own else "ModelCard"
        paths[card] = get(card, "The model of this name.", shown)
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
                "operationId": identifier("post", path),
                "parameters": parameters(path, []),
                "requestBody": {"required": True, "content": json_content(reference(request))},
                "responses": {
                    "200": {
                        "description": "As asked.",
                        "headers": RATE_LIMIT_HEADERS,
                        "content": json_content(reference(answer)),
                    }
                }
                | failures(path, *(status for status in ERRORS if status != 424)),
            }
        }
        for path, summary, request, answer in described
    }


def _metrics(route: str) -> Schema:
    if route == "off":
        return {}
    described = get("/metrics", "The metrics of gateway and service, for Prometheus.", None)
    described["get"]["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    if route == "open":
        described["get"] |= {"security": [], "parameters": []}
    return {"/metrics": described}


def _open() -> Schema:
    """The routes that need no key."""
    paths = {
        "/health/live": get("/health/live", "200 for as long as the gateway lives.", "Status"),
        "/health/ready": get("/health/ready", "200 while the model can be asked.", "Status"),
        "/health": get("/health", "The same as /health/ready; vLLM's and llama.cpp's.", "Status"),
        "/ping": get("/ping", "The same as /health/ready; SageMaker's.", "Status"),
        "/version": get("/version", "The version of the server.", "Version"),
        "/openapi.json": get("/openapi.json", "This document.", None),
        "/docs": get("/docs", "This document as a page.", None),
        "/": get("/", "The page to chat with, for a browser.", None),
        "/page/{name}": get("/page/{name}", "Its scripts, style and icon.", None),
    }
    for methods in paths.values():
        operation = methods["get"]
        operation["security"] = []
        operation["parameters"] = [kept for kept in operation["parameters"] if kept["in"] == "path"]
    for path, kind in (("/docs", "text/html"), ("/", "text/html"), ("/page/{name}", "*/*")):
        paths[path]["get"]["responses"]["200"]["content"] = {kind: {"schema": {"type": "string"}}}
    paths["/ping"]["post"] = paths["/ping"]["get"] | {"operationId": "post_ping"}
    return paths
