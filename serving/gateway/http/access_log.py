"""Tells of every request when it is over: a line in the log, metrics, a span, its caller's account.

An ASGI application around the gateway's own. No text of a request or an answer is told, unless the
operator asked for it (`--log-prompts`).

A request ends in one of three ways: `whole`; `dropped`, as its client went; `broken`, as it failed
when its answer had begun. Its tokens are charged in all three, as far as they were computed.
"""

import logging

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ServingError
from serving.gateway.config import Books
from serving.gateway.http.request_record import Exchange, headers_of, prompt_of
from serving.observe.logs import fields
from serving.observe.tracing import Span

WHOLE, DROPPED, BROKEN = "whole", "dropped", "broken"
OTHER = "other"  # the route, to metrics, of a request for which there is none
_CLIENT_WENT = 499  # nginx's status, which nobody reads
_LONGEST_PATH = 200  # that is told
_UNTOLD = "/health/"  # asked several times a second: for metrics only

logger = logging.getLogger(__name__)


class Journal:
    """See above.

    Args:
        app: The application.
        books: Where to tell.
        target: The model service, as gRPC names it.
    """

    def __init__(self, app: ASGIApp, books: Books, target: str) -> None:
        self._app = app
        self._books = books
        address, _, port = target.rpartition(":")
        self._server: dict[str, str | int] = {"server.address": target}
        if port.isdecimal() and "," not in target:
            self._server = {"server.address": address, "server.port": int(port)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        metrics, exchange = self._books.metrics, self._begin(scope)

        async def note(message: Message) -> None:
            was_stream = exchange.is_stream
            exchange.note(message)
            if exchange.is_stream and not was_stream:
                metrics.open_streams.inc()
            await send(message)

        outcome = DROPPED
        metrics.open_requests.inc()
        try:
            await self._app(scope, receive, note)
            if exchange.is_whole and exchange.status != _CLIENT_WENT:
                outcome = WHOLE
        except Exception as error:
            cause = error.__cause__ or error
            if not isinstance(cause, ClientDisconnect):
                outcome = BROKEN
                exchange.error, exchange.reason = _told_of(cause)
            raise
        finally:
            metrics.open_requests.dec()
            metrics.open_streams.dec(exchange.is_stream)
            self._close(scope, exchange, outcome)

    def _begin(self, scope: Scope) -> Exchange:
        span = Span({})
        if not scope["path"].startswith(_UNTOLD):
            # The method is the server's to check, and its name is short; the path may be anything.
            span = self._books.traces.begin(scope["method"], headers_of(scope))
        return Exchange(
            scope,
            self._books.accounts,
            span,
            self._server,
            keeps_texts=self._books.log_prompts,
        )

    def _close(self, scope: Scope, exchange: Exchange, outcome: str) -> None:
        status = exchange.status or (500 if outcome == BROKEN else _CLIENT_WENT)
        self._books.metrics.ended(
            exchange.route or OTHER, status, outcome, exchange.first_byte, exchange.seconds
        )
        if exchange.calls and (exchange.first_token is not None or outcome == DROPPED):
            prompt, completion = exchange.prompt_tokens, exchange.completion_tokens
            self._books.metrics.tokens(prompt, completion)
            if exchange.caller is not None:
                self._books.accounts.charge(exchange.caller, prompt, completion)
        if not scope["path"].startswith(_UNTOLD):
            self._log(scope, exchange, status, outcome)
            _end_spans(scope, exchange, status, outcome)

    def _log(self, scope: Scope, exchange: Exchange, status: int, outcome: str) -> None:
        calls = exchange.calls
        told: dict[str, object] = {
            "id": exchange.id,
            "caller": exchange.caller,
            "method": scope["method"],
            "path": scope["path"][:_LONGEST_PATH],
            "status": status,
            "outcome": outcome,
            "error": exchange.error,
            "reason": exchange.reason,
            "seconds": round(exchange.seconds, 4),
        }
        if calls:
            first = exchange.first_token
            told |= {
                "model": calls[0].model,
                "prompt_tokens": exchange.prompt_tokens,
                "completion_tokens": exchange.completion_tokens,
                "first_token_seconds": None if first is None else round(first, 4),
                "finish": ",".join(each for call in calls for each in call.tally.finish_reasons),
            }
            if self._books.log_prompts:
                told["prompts"] = [prompt_of(call.message) for call in calls]
                told["answers"] = [list((call.tally.texts or {}).values()) for call in calls]
        level = logging.WARNING if status >= 500 or outcome == BROKEN else logging.INFO
        logger.log(level, "request", extra=fields(**told))


def _end_spans(scope: Scope, exchange: Exchange, status: int, outcome: str) -> None:
    failure = None if outcome == WHOLE and status < 500 else exchange.error or outcome
    for call in exchange.calls:
        tally, span = call.tally, call.span
        span.set(
            {
                "gen_ai.response.model": call.model,
                "gen_ai.response.finish_reasons": tally.finish_reasons,
                "gen_ai.usage.input_tokens": tally.prompt_tokens,
                "gen_ai.usage.output_tokens": tally.completion_tokens,
            }
        )
        if failure or status >= 400:
            span.fail(failure or exchange.error or str(status))
        span.end()
    span, method = exchange.span, scope["method"]
    if exchange.route:
        span.rename(f"{method} {exchange.route}")
        span.set({"http.route": exchange.route})
    span.set(
        {
            "http.request.method": method,
            "http.response.status_code": status,
            "url.path": scope["path"][:_LONGEST_PATH],
            "url.scheme": scope["scheme"],
            "mixtral.request.id": exchange.id,
        }
    )
    if failure:
        span.fail(failure)
    span.end()


def _told_of(error: BaseException) -> tuple[str, str | None]:
    """Azure's code and the reason; of what is a bug, its name, for the server logs the rest."""
    if isinstance(error, ServingError):
        return error.azure_code, str(error)
    return type(error).__name__, None
