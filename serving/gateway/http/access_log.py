"""The access log: a line in the log, metrics and a span for every request when it is over.

An ASGI application around the gateway's own. No text of a request or an answer is logged, unless
the operator asked for it (`--log-prompts`). The lines have the logger `LOGGER`.

A request ends in one of four ways: `whole`; `dropped`, as its client went away; `broken`, as it
failed when its answer had begun; `refused`, as it could not be read (protocol.py).
"""

import logging
import re
import uuid
from collections import Counter

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ServingError
from serving.gateway.http.metrics import GatewayMetrics
from serving.gateway.http.request_record import (
    CLIENT_CLOSED_REQUEST,
    RequestRecord,
    add_request_id,
    prompt_of,
)
from serving.observe.logs import fields
from serving.observe.tracing import Span, Traces

LOGGER = "serving.gateway.http.access_log"
WHOLE, DROPPED, BROKEN, REFUSED = "whole", "dropped", "broken", "refused"
OTHER = "other"  # the route, in metrics, of a request for which there is none
# Health checks come several times a second: they are counted, but not logged or traced.
UNLOGGED = frozenset({"/health", "/health/live", "/health/ready", "/ping"})
_MAX_PATH_LENGTH = 200
# The most finish reasons that a line has one by one: a request may have 2,048 choices.
_MAX_REASONS = 16
_CLIENT_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,100}")

logger = logging.getLogger(LOGGER)


class AccessLog:
    """Records every request, gives its answer the request's id, and logs it when it is over.

    Args:
        app: The application.
        metrics: The metrics that count requests.
        traces: The traces that requests' spans begin in.
        log_prompts: Whether the texts of prompts and answers are logged.
    """

    def __init__(
        self, app: ASGIApp, metrics: GatewayMetrics, traces: Traces, log_prompts: bool = False
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._traces = traces
        self._log_prompts = log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        metrics, record = self._metrics, self._begin(scope)

        async def note(message: Message) -> None:
            was_stream = record.is_stream
            if message["type"] == "http.response.start":
                _add_ids(message, scope, record.id)
            record.note(message)
            if record.is_stream and not was_stream:
                metrics.open_streams.inc()
            await send(message)

        outcome = DROPPED
        metrics.open_requests.inc()
        try:
            await self._app(scope, receive, note)
            if record.is_whole and record.status != CLIENT_CLOSED_REQUEST:
                outcome = WHOLE
        except Exception as error:
            cause = error.__cause__ or error
            if not isinstance(cause, ClientDisconnect):
                outcome = BROKEN
                record.error, record.reason = error_fields(cause)
            raise
        finally:
            metrics.open_requests.dec()
            metrics.open_streams.dec(record.is_stream)
            self._close(scope, record, outcome)

    def _begin(self, scope: Scope) -> RequestRecord:
        span = Span({})
        if scope["path"] not in UNLOGGED:
            # The server has checked the method, and its name is short; the path may be anything.
            span = self._traces.begin(scope["method"], Headers(scope=scope))
        return RequestRecord(scope, span, keeps_texts=self._log_prompts)

    def _close(self, scope: Scope, record: RequestRecord, outcome: str) -> None:
        status = record.status or (500 if outcome == BROKEN else CLIENT_CLOSED_REQUEST)
        self._metrics.ended(
            record.route or OTHER, status, outcome, record.first_byte, record.seconds
        )
        if record.calls and (record.first_token is not None or outcome == DROPPED):
            self._metrics.tokens(record.prompt_tokens, record.completion_tokens)
        if scope["path"] not in UNLOGGED:
            _end_spans(scope, record, status, outcome)
            self._log(scope, record, status, outcome)

    def _log(self, scope: Scope, record: RequestRecord, status: int, outcome: str) -> None:
        calls = record.calls
        line: dict[str, object] = {
            "id": record.id,
            "client": record.client,
            "caller": record.caller,
            "method": scope["method"],
            "path": scope["path"][:_MAX_PATH_LENGTH],
            "status": status,
            "outcome": outcome,
            "error": record.error,
            "reason": record.reason,
            "seconds": round(record.seconds, 4),
        }
        if calls:
            first = record.first_token
            reasons = [reason for call in calls for reason in call.tokens.finish_reasons]
            line |= {
                "model": calls[0].answered_by,
                "prompt_tokens": record.prompt_tokens,
                "completion_tokens": record.completion_tokens,
                "first_token_seconds": None if first is None else round(first, 4),
                "finish": _listed(reasons),
            }
            if self._log_prompts:
                line["prompts"] = [prompt_of(call.message) for call in calls]
                line["answers"] = [list((call.tokens.texts or {}).values()) for call in calls]
        level = logging.WARNING if status >= 500 or outcome == BROKEN else logging.INFO
        logger.log(level, "request", extra=fields(**line))


def log_refusal(error: ServingError, client: str, metrics: GatewayMetrics) -> None:
    """Logs and counts a request that was refused before it could be read.

    Args:
        error: The reason, which the client is told.
        client: The client's address.
        metrics: The metrics that count requests.
    """
    kind, reason = error_fields(error)
    line = {
        "id": uuid.uuid4().hex,
        "client": client,
        "status": error.http_status,
        "outcome": REFUSED,
        "error": kind,
        "reason": reason,
    }
    metrics.ended(OTHER, error.http_status, REFUSED, None, 0.0)
    logger.info("request", extra=fields(**line))


def error_fields(error: BaseException) -> tuple[str, str | None]:
    """Returns the log's `error` and `reason`: Azure's code and the message of an error of ours.

    Any other exception is a bug, of which the server logs the traceback: its name alone.
    """
    if isinstance(error, ServingError):
        return error.azure_code, str(error)
    return type(error).__name__, None


def _listed(reasons: list[str]) -> str:
    """Returns the finish reasons of all choices; of many, how often there is each."""
    if len(reasons) > _MAX_REASONS:
        counts = Counter(reasons)
        reasons = [f"{count} x {reason}" for reason, count in sorted(counts.items())]
    return ",".join(reasons)


def _add_ids(message: Message, scope: Scope, request_id: str) -> None:
    """Gives the answer the request's id, and the client's own if Azure's client has sent one."""
    headers = MutableHeaders(scope=message)
    add_request_id(headers, scope["path"], request_id)
    client_id = Headers(scope=scope).get("x-ms-client-request-id", "")
    if _CLIENT_REQUEST_ID.fullmatch(client_id):
        headers["x-ms-client-request-id"] = client_id


def _end_spans(scope: Scope, record: RequestRecord, status: int, outcome: str) -> None:
    failure = None if outcome == WHOLE and status < 500 else record.error or outcome
    for call in record.calls:
        tokens, span = call.tokens, call.span
        span.set(
            {
                "gen_ai.response.model": call.answered_by,
                "gen_ai.response.finish_reasons": tokens.finish_reasons,
                "gen_ai.usage.input_tokens": tokens.prompt_tokens,
                "gen_ai.usage.output_tokens": tokens.completion_tokens,
            }
        )
        if failure or status >= 400:
            span.fail(failure or record.error or str(status))
        span.end()
    span, method = record.span, scope["method"]
    if record.route:
        span.rename(f"{method} {record.route}")
        span.set({"http.route": record.route})
    span.set(
        {
            "http.request.method": method,
            "http.response.status_code": status,
            "url.path": scope["path"][:_MAX_PATH_LENGTH],
            "url.scheme": scope["scheme"],
            "mixtral.request.id": record.id,
        }
    )
    if failure:
        span.fail(failure)
    # A span that never ends is not sent: a stranger's requests fill no store of traces, whatever
    # sampling its headers ask for.
    if record.caller is not None or status not in (401, 404):
        span.end()
