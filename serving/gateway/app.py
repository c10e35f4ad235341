"""The gateway: the HTTP endpoint that clients of Azure's and OpenAI's chat API already speak.

It holds a stub of the model service and nothing else. A request is let in (auth.py), then read,
admitted, asked of the service and answered (answering.py). Every failure on the way has one shape
(http/failures.py), and every request ends in the access log (http/access_log.py).
"""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from serving.access.credentials import Access
from serving.access.tls import ServiceTls
from serving.accounting.admission import Admission
from serving.channel import options_for
from serving.gateway.answering import Gateway, Limits
from serving.gateway.config import Books
from serving.gateway.http.access_log import AccessLog
from serving.gateway.http.failures import answer_failures
from serving.gateway.openapi import document, page
from serving.gateway.routes import add_routes
from serving.gateway.upstream import ModelService

# What scripts of other origins may read of an answer.
_EXPOSED = ["x-request-id", "x-ms-client-request-id", "x-ms-error-code", "retry-after"]


def create_app(
    target: str,
    access: Access,
    *,
    service_key: str,
    service_tls: ServiceTls | None = None,
    books: Books | None = None,
    limits: Limits = Limits(),
    model_type: str | None = None,
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """The gateway as an ASGI application.

    Args:
        target: The model service as gRPC names it, such as "127.0.0.1:50051".
        access: Who may ask.
        service_key: The key that the service is shown.
        service_tls: How the service is known over TLS; without it the connection is plain.
        books: Where requests are told of; they are closed with the application.
        limits: What it puts up with.
        model_type: What /info says in the place of the service's "chat-completions".
        cors_origins: Of pages in browsers that may ask; "*" stands for all.
    """
    books = books or Books()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            async with open_channel(target, service_tls) as channel:
                service = ModelService(channel, service_key, target)
                app.state.gateway = Gateway(service, Admission(books.accounts), limits)
                yield
        finally:
            books.close()

    app = FastAPI(
        title="mixtral-jax",
        lifespan=lifespan,
        # Their pages fetch scripts from elsewhere, and the document is our own.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        # A redirect would have clients repeat their key and body, or lose them.
        redirect_slashes=False,
    )
    app.state.access = access
    app.state.accounts = books.accounts
    app.state.model_type = model_type
    app.state.created = int(time.time())
    app.state.document = document()
    app.state.page = page(app.state.document)
    add_routes(app)
    answer_failures(app)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
    app.add_middleware(
        AccessLog, metrics=books.metrics, traces=books.traces, log_prompts=books.log_prompts
    )
    return app


def open_channel(target: str, tls: ServiceTls | None) -> grpc.aio.Channel:
    """A channel to the service; it connects when it is first used, and whenever it must again."""
    options = options_for(target)
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, tls.credentials(), [*options, *tls.options()])
