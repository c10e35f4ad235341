"""The routes: which path is answered by what. `openapi` describes them; a test compares the two.

The same is offered under the paths of several APIs, for clients append theirs to whatever address
they are given. Azure's own paths are strict about parameters that its API does not list, as Azure
is; the others take what their clients send.
"""

import re

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from serving.errors import InvalidRequest, NotFound
from serving.gateway.answering import Gateway
from serving.gateway.auth import require
from serving.gateway.dialect.chat import response as reply
from serving.gateway.dialect.chat.request import Extras
from serving.gateway.usage_route import report_usage

AZURE_PREFIXES = ("", "/models")
# A client of Azure OpenAI's names a deployment in the path; it is accepted whatever it is.
OPENAI_PREFIXES = ("/v1", "/openai/v1", "/openai/deployments/{name}")
PREFIXES = (*AZURE_PREFIXES, *OPENAI_PREFIXES)
MODEL_PATHS = ("/v1/models", "/openai/v1/models", "/openai/models", "/models")
INFO_PATHS = ("/info", "/models/info")
EMBEDDINGS = ("/embeddings", "/images/embeddings")

# Azure's versions are dates; its newest clients say "preview" or "latest".
_VERSION = re.compile(r"\d{4}-\d{2}-\d{2}(-preview)?|preview|latest")


def add_routes(app: FastAPI) -> None:
    """Has the application answer all of them.

    Its state holds `gateway`, `access`, `model_type`, `created`, `document` and `page`.
    """
    guarded = [Depends(_let_in)]
    for prefix in AZURE_PREFIXES:
        path = f"{prefix}/chat/completions"
        app.add_api_route(path, azure_chat, methods=["POST"], dependencies=guarded)
    for prefix in OPENAI_PREFIXES:
        path = f"{prefix}/chat/completions"
        app.add_api_route(path, openai_chat, methods=["POST"], dependencies=guarded)
    for prefix in ("", *OPENAI_PREFIXES):
        path = f"{prefix}/completions"
        app.add_api_route(path, completions, methods=["POST"], dependencies=guarded)
    for prefix in PREFIXES:
        for name in EMBEDDINGS:
            path = f"{prefix}{name}"
            app.add_api_route(path, embeddings, methods=["POST"], dependencies=guarded)
    reading = ["GET", "HEAD"]
    for path in INFO_PATHS:
        app.add_api_route(path, info, methods=reading, dependencies=guarded)
    for path in MODEL_PATHS:
        app.add_api_route(path, models, methods=reading, dependencies=guarded)
        one = f"{path}/{{model_id:path}}"  # a name may hold slashes
        app.add_api_route(one, model_card, methods=reading, dependencies=guarded)
    app.add_api_route("/usage", report_usage, methods=reading, dependencies=guarded)
    app.add_api_route("/health/live", live, methods=reading)
    app.add_api_route("/health/ready", ready, methods=reading)
    app.add_api_route("/openapi.json", openapi, methods=reading)
    app.add_api_route("/docs", docs, methods=reading)


async def azure_chat(request: Request) -> Response:
    """A chat on Azure's paths."""
    headers = request.headers
    # The shorter name is the one in Microsoft's own sample for JavaScript.
    policy = headers.get("extra-parameters") or headers.get("extra-params")
    return await _gateway(request).chat(request, Extras.from_header(policy))


async def openai_chat(request: Request) -> Response:
    """A chat on the paths of OpenAI's and Mistral's clients, which send what they like."""
    return await _gateway(request).chat(request, Extras.LENIENT)


async def completions(request: Request) -> Response:
    """A text completion."""
    return await _gateway(request).complete(request)


async def embeddings(request: Request) -> Response:
    """What a chat model cannot do, in Azure's words."""
    raise NotFound(
        f"Modality not supported by the model: {request.url.path[:200]} was not found, for this "
        "endpoint serves a chat model; send chats to POST /chat/completions"
    )


async def info(request: Request) -> Response:
    """Which model is served, as Azure's clients ask."""
    model = await _gateway(request).service.model()
    return JSONResponse(reply.model_info(model, request.app.state.model_type).model_dump())


async def models(request: Request) -> Response:
    """Which model is served, as OpenAI's and Mistral's clients ask."""
    card = reply.model_card(await _gateway(request).service.model(), request.app.state.created)
    return JSONResponse({"object": "list", "data": [card.model_dump()]})


async def model_card(request: Request) -> Response:
    """One model of the list, which has one."""
    card = reply.model_card(await _gateway(request).service.model(), request.app.state.created)
    if (asked := request.path_params["model_id"]) != card.id:
        raise NotFound(f"the model '{asked[:200]}' was not found; this endpoint serves '{card.id}'")
    return JSONResponse(card.model_dump())


async def live() -> Response:
    """200 for as long as the process lives."""
    return JSONResponse({"status": "live"})


async def ready(request: Request) -> Response:
    """200 if the model service serves, 503 until then."""
    await _gateway(request).service.check_ready()
    return JSONResponse({"status": "ready"})


async def openapi(request: Request) -> Response:
    """What is offered, for programs."""
    return JSONResponse(request.app.state.document)


async def docs(request: Request) -> Response:
    """What is offered, for people."""
    return HTMLResponse(request.app.state.page)


async def _let_in(request: Request) -> None:
    await require(request)
    version = request.query_params.get("api-version")
    if version is not None and not _VERSION.fullmatch(version):
        raise InvalidRequest(
            f"api-version is '{version[:40]}'; leave it out, or give a date like 2024-05-01-preview"
        )


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway
