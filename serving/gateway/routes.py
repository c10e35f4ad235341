"""The routes: the path of each operation. `openapi` describes them; a test compares the two.

The same operations are offered under the paths of several APIs, because clients append their paths
to whatever address they are given. Azure's own paths are strict about parameters that its API does
not list, as Azure is; the others ignore them.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import wraps

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import Scope

from serving.errors import ModelNotFound, NotFound
from serving.gateway.answering import CHAT, MESSAGES, RESPONSES, TEXT, Gateway
from serving.gateway.auth import require
from serving.gateway.dialect import models, openai
from serving.gateway.dialect.anthropic.error import MESSAGE_ID_PREFIX
from serving.gateway.dialect.anthropic.hosted_tools import MessagesFields
from serving.gateway.dialect.anthropic.models import (
    anthropic_model,
    asks_as_anthropic,
    model_page,
)
from serving.gateway.dialect.azure import ExtraParameters, check_api_version
from serving.gateway.dialect.responses.hosted_tools import ResponsesFields
from serving.gateway.endpoints.health import health, live, ready, tell_version
from serving.gateway.endpoints.metrics import report_metrics, show_metrics
from serving.gateway.endpoints.tokens import count_tokens, detokenize, tokenize
from serving.gateway.endpoints.usage import report_usage
from serving.gateway.page.files import INDEX, PageFile

AZURE_PREFIXES = ("", "/models")
# A client of Azure OpenAI's names the model in the path, as a deployment.
OPENAI_PREFIXES = ("/v1", "/openai/v1", "/openai/deployments/{name}")
PREFIXES = (*AZURE_PREFIXES, *OPENAI_PREFIXES)
# The clients of Azure OpenAI's ask for responses under /openai, without a deployment.
RESPONSES_PREFIXES = ("", "/openai", *OPENAI_PREFIXES)
MESSAGES_PATHS = ("/v1/messages", "/anthropic/v1/messages")
MODEL_PATHS = (
    *("/v1/models", "/openai/v1/models", "/openai/models", "/models"),
    "/anthropic/v1/models",
)
INFO_PATHS = ("/info", "/models/info")
# Seconds for which a list of models is remembered: adapters come and go.
LIST_SECONDS = 1.0
EMBEDDINGS = ("/embeddings", "/images/embeddings")


def add_routes(app: FastAPI) -> None:
    """Adds all routes to the application.

    Its state must hold `gateway`, `tokenization`, `access`, `accounts`, `metrics`, `model_type`,
    `created`, `document`, `page`, `chat_page`, `ignores_hosted_tools`, `metrics_route` and
    `usage_details`.
    """
    for prefix in AZURE_PREFIXES:
        path = f"{prefix}/chat/completions"
        app.routes.append(_Guarded(path, azure_chat))
    for prefix in OPENAI_PREFIXES:
        path = f"{prefix}/chat/completions"
        app.routes.append(_Guarded(path, openai_chat))
    for prefix in ("", *OPENAI_PREFIXES):
        path = f"{prefix}/completions"
        app.routes.append(_Guarded(path, completions))
    for prefix in RESPONSES_PREFIXES:
        path = f"{prefix}/responses"
        app.routes.append(_Guarded(path, responses))
    for path in MESSAGES_PATHS:
        app.routes.append(_Guarded(path, messages))
        counting = f"{path}/count_tokens"
        app.routes.append(_Guarded(counting, count_tokens))
    for prefix in PREFIXES:
        for name in EMBEDDINGS:
            path = f"{prefix}{name}"
            app.routes.append(_Guarded(path, embeddings))
    reading = ["GET", "HEAD"]
    for path in INFO_PATHS:
        app.routes.append(_Guarded(path, info, reading))
    for path in MODEL_PATHS:
        app.routes.append(_Guarded(path, list_models, reading))
        card = f"{path}/{{model_id:path}}"  # a name may hold slashes
        app.routes.append(_Guarded(card, get_model, reading))
    app.add_api_route("/usage", report_usage, methods=reading, dependencies=[Depends(_check)])
    app.routes.append(_Guarded("/tokenize", tokenize))
    app.routes.append(_Guarded("/detokenize", detokenize))
    match app.state.metrics_route:
        case "operators":
            app.routes.append(_Guarded("/metrics", report_metrics, reading))
        case "open":
            app.add_api_route("/metrics", show_metrics, methods=reading)
    app.add_api_route("/health/live", live, methods=reading)
    app.add_api_route("/health/ready", ready, methods=reading)
    app.add_api_route("/health", health, methods=reading)
    # SageMaker asks with GET, and vLLM takes both.
    app.add_api_route("/ping", health, methods=[*reading, "POST"])
    app.add_api_route("/version", tell_version, methods=reading)
    app.add_api_route("/openapi.json", openapi, methods=reading)
    app.add_api_route("/docs", docs, methods=reading)
    app.add_api_route("/", chat_page, methods=reading)
    app.add_api_route("/page/{name}", chat_page, methods=reading)


async def azure_chat(request: Request) -> Response:
    """Answers a chat on Azure's paths."""
    headers = request.headers
    # The shorter name stands in Microsoft's own sample for JavaScript.
    header = headers.get("extra-parameters") or headers.get("extra-params")
    extra = ExtraParameters.from_header(header)
    return await _gateway(request).answer(request, CHAT, extra.apply)


async def openai_chat(request: Request) -> Response:
    """Answers a chat on the paths of OpenAI's and Mistral's clients."""
    return await _gateway(request).answer(
        request,
        CHAT,
        openai.check_unknown,
        openai.CHAT_ID_PREFIX,
        tells_cached=request.app.state.usage_details,
    )


async def completions(request: Request) -> Response:
    """Answers a text completion."""
    return await _gateway(request).answer(
        request,
        TEXT,
        openai.check_unknown,
        openai.TEXT_ID_PREFIX,
        tells_cached=request.app.state.usage_details and openai.is_openai_path(request.url.path),
    )


async def responses(request: Request) -> Response:
    """Answers a request to OpenAI's Responses API."""
    fields = ResponsesFields(ignores_hosted_tools=request.app.state.ignores_hosted_tools)
    response = await _gateway(request).answer(
        request, RESPONSES, fields.apply, openai.RESPONSE_ID_PREFIX, tells_cached=True
    )
    response.headers.update(fields.headers)
    return response


async def messages(request: Request) -> Response:
    """Answers a request to Anthropic's Messages API."""
    fields = MessagesFields(ignores_hosted_tools=request.app.state.ignores_hosted_tools)
    response = await _gateway(request).answer(
        request, MESSAGES, fields.apply, MESSAGE_ID_PREFIX, tells_cached=True
    )
    response.headers.update(fields.headers)
    return response


async def embeddings(request: Request) -> Response:
    """Refuses, in Azure's words, because a chat model makes no embeddings."""
    raise NotFound(
        f"Modality not supported by the model: {request.url.path[:200]} was not found, for this "
        "endpoint serves a chat model; send chats to POST /chat/completions"
    )


async def info(request: Request) -> Response:
    """Returns the served model as Azure's clients ask for it."""
    model = await _gateway(request).service.model()
    return JSONResponse(models.model_info(model, request.app.state.model_type).model_dump())


async def list_models(request: Request) -> Response:
    """Returns the list of the served model and its adapters."""
    cards = await _cards(request)
    if asks_as_anthropic(request.url.path, request.headers):
        return JSONResponse(model_page(cards, request.query_params).model_dump())
    data = [card.model_dump() for card in cards]
    return JSONResponse({"object": "list", "data": data})


async def get_model(request: Request) -> Response:
    """Returns a model of the list by its name; raises ModelNotFound for every other name."""
    cards = await _cards(request)
    asked = request.path_params["model_id"]
    for card in cards:
        if card.id == asked:
            is_anthropic = asks_as_anthropic(request.url.path, request.headers)
            shown = anthropic_model(card) if is_anthropic else card
            return JSONResponse(shown.model_dump())
    raise ModelNotFound.of(asked, cards[0].id)


async def openapi(request: Request) -> Response:
    """Returns the OpenAPI document."""
    return Response(request.app.state.document, media_type="application/json")


async def docs(request: Request) -> Response:
    """Returns the document as a page for people."""
    return HTMLResponse(request.app.state.page)


async def chat_page(request: Request) -> Response:
    """Returns a file of the page to chat with; raises NotFound where there is none."""
    page: Mapping[str, PageFile] = request.app.state.chat_page
    file = page.get(request.path_params.get("name", INDEX))
    if file is None:
        reason = "the page has no such file" if page else "the page is turned off with --no-page"
        raise NotFound(f"{request.url.path[:200]} was not found: {reason}")
    return file.answer(request)


async def _cards(request: Request) -> list[models.ModelCard]:
    """Returns the cards of the model and of the adapters that are loaded now."""
    model = await _gateway(request).service.model(LIST_SECONDS)
    return models.model_cards(model, request.app.state.created)


class _Guarded(Route):
    """A route behind `_check`, for an endpoint that takes the request and nothing else.

    A plain route of Starlette: to find out anew for each request what a function depends on costs
    FastAPI 0.1 ms, which every first token would wait for.
    """

    def __init__(
        self,
        path: str,
        endpoint: Callable[[Request], Awaitable[Response]],
        methods: Collection[str] = ("POST",),
    ) -> None:
        @wraps(endpoint)
        async def checked(request: Request) -> Response:
            await _check(request)
            return await endpoint(request)

        super().__init__(path, checked, methods=methods)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Returns whether a request is for this route, which the access log then names."""
        match, child_scope = super().matches(scope)
        if match is not Match.NONE:
            child_scope["route"] = self
        return match, child_scope


async def _check(request: Request) -> None:
    """Lets the caller in, then checks the version in the query."""
    await require(request)
    check_api_version(request.query_params.get("api-version"))


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway
