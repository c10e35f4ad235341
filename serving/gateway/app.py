"""The gateway: the HTTP endpoint that clients of Azure's and OpenAI's chat API already speak.

It holds a stub of the model service and nothing else. A request is let in (auth.py), then read,
admitted, asked of the service and answered (answering.py). Every failure on the way has one shape
(http/failures.py), and every request ends in the access log (http/access_log.py).
"""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from serving.access.credentials import Access
from serving.access.loopback import is_loopback
from serving.accounting.accounts import Accounts
from serving.accounting.admission import Admission
from serving.accounting.caller_fields import CallerFields
from serving.gateway.answering import VIOLATION_HEADER, WEAKENED_HEADER, Gateway, Limits
from serving.gateway.config import GatewayConfig
from serving.gateway.connection import Connection
from serving.gateway.dialect.anthropic.error import REQUEST_ID_HEADER
from serving.gateway.dialect.responses.hosted_tools import IGNORED_HEADER
from serving.gateway.endpoints.root_path import RootPath
from serving.gateway.endpoints.tokens import Tokenization
from serving.gateway.http.access_log import AccessLog
from serving.gateway.http.drain import Drain
from serving.gateway.http.failures import answer_failures
from serving.gateway.http.metrics import GatewayMetrics
from serving.gateway.http.origin import OriginCheck
from serving.gateway.openapi.document import document
from serving.gateway.openapi.operations import RATE_LIMIT_HEADERS
from serving.gateway.openapi.page import page
from serving.gateway.page.files import read_page
from serving.gateway.routes import add_routes
from serving.gateway.upstream import ModelService
from serving.observe.key_reloads import report_failed_certificate, report_failed_reload
from serving.observe.tracing import Traces

# Headers of an answer that scripts of other origins may read.
_EXPOSED = [
    *("x-request-id", REQUEST_ID_HEADER, "x-ms-client-request-id", "x-ms-error-code"),
    *("retry-after", "retry-after-ms"),
    *(WEAKENED_HEADER, VIOLATION_HEADER, IGNORED_HEADER),
    *RATE_LIMIT_HEADERS,
]


def create_app(
    config: GatewayConfig,
    access: Access,
    *,
    accounts: Accounts | None = None,
    metrics: GatewayMetrics | None = None,
    traces: Traces | None = None,
    limits: Limits | None = None,
    drain: Drain | None = None,
) -> FastAPI:
    """Returns the gateway as an ASGI application.

    Args:
        config: Its settings.
        access: Who may ask.
        accounts: What callers may use and have used; by default as `config` says.
        metrics: The figures of this process.
        traces: Where spans begin; by default as `config` says.
        limits: Bounds of a request; by default with the heartbeat of `config`.
        drain: Refuses requests when the gateway ends, within the access log.

    Accounts and traces are closed with the application.

    Raises SetupError if what `config` names cannot be used.
    """
    connection = Connection(config.address, config.service_tls())
    metrics = metrics or GatewayMetrics()
    report_failed_certificate(
        metrics.registry, lambda: connection.reload_failed, "mixtral_service_certificate"
    )
    report_failed_reload(metrics.registry, lambda: access.reload_failed)
    traces = traces or Traces.exported(
        config.otlp_endpoint, "gateway", trusts_parents=config.trust_traceparent
    )
    accounts = accounts or Accounts.of(config)
    admission = Admission(accounts, config.assumed_max_tokens, config.cached_token_charge)
    limits = limits or Limits(heartbeat_seconds=config.heartbeat_seconds)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            async with connection.channel(lambda newest: service.use(newest)) as channel:
                service = ModelService(channel, config.gateway_key, config.address)
                fields = CallerFields(config.gateway_key, share_prefixes=config.share_prefixes)
                gateway = Gateway(service, admission, fields, limits)
                app.state.gateway = gateway
                app.state.tokenization = Tokenization(
                    gateway, admission, limits.body_bytes, limits.body_seconds
                )
                yield
        finally:
            accounts.close()
            traces.close()

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
    app.state.accounts = accounts
    app.state.metrics = metrics
    app.state.metrics_route = config.metrics_route
    app.state.usage_details = config.usage_details
    app.state.model_type = config.model_type
    app.state.ignores_hosted_tools = config.ignore_hosted_tools
    app.state.created = int(time.time())
    described = document(config.root_path, metrics_route=config.metrics_route)
    # Anybody may ask for it: it is written once.
    app.state.document = json.dumps(described).encode()
    app.state.page = page(described)
    app.state.chat_page = read_page() if config.page else {}
    add_routes(app)
    answer_failures(app)
    if drain is not None:
        app.add_middleware(drain.around)
    if config.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
    app.add_middleware(
        OriginCheck,
        is_local=is_loopback if access.is_open else None,
        allowed_origins=config.cors_origin,
    )
    app.add_middleware(AccessLog, metrics=metrics, traces=traces, log_prompts=config.log_prompts)
    if config.root_path:
        app.add_middleware(RootPath, root_path=config.root_path)
    return app
