"""Every answer that is not 2xx: an error of serving/errors.py in its path's shape, with headers."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from serving.errors import (
    EngineFailure,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RequestTooLarge,
    ServingError,
    Unauthenticated,
    Unavailable,
)
from serving.gateway.dialect.anthropic.error import (
    anthropic_error,
    anthropic_headers,
    anthropic_status,
    is_anthropic_path,
)
from serving.gateway.dialect.error_body import error_body, openai_error, openai_status
from serving.gateway.dialect.openai import is_openai_path
from serving.gateway.dialect.parsing import refusal
from serving.gateway.http.body import BodyTooSlow, Lingering
from serving.gateway.http.request_record import (
    CLIENT_CLOSED_REQUEST,
    RequestRecord,
    add_request_id,
)

# The name, in a request's state, of the function that returns the headers of its caller's limits.
LIMIT_HEADERS = "limit_headers"


def answer_failures(app: FastAPI) -> None:
    """Makes the application answer every failure in the same shape."""
    app.add_exception_handler(ServingError, _on_serving_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_query)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_bug)


async def refuse_while_draining(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request that comes while the gateway drains: 503. An ASGI application."""
    error = Unavailable("this server is shutting down; send the request again, to another one")
    response = answer_to(error, scope)
    response.headers["connection"] = "close"
    await response(scope, receive, send)


def answer_to(error: ServingError, scope: Scope) -> Response:
    """Returns the answer that shows an error to a client: its body, status and headers.

    Args:
        error: The error.
        scope: The request in ASGI's form. Its path says whose clients read the answer.
    """
    headers = {"x-ms-error-code": error.azure_code}
    if error.retry_after is not None:
        # Azure's clients repeat every request whose answer has it, so no other answer may have it.
        headers["retry-after"] = str(error.retry_after)
        headers["retry-after-ms"] = str(error.retry_after_ms)
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, EngineFailure):
        headers["ms-azureml-model-error-reason"] = "model_error"
        headers["ms-azureml-model-error-statuscode"] = "500"
    # The rest of such a body must not be waited for.
    kind = Lingering if isinstance(error, (RequestTooLarge, BodyTooSlow)) else JSONResponse
    path = scope["path"]
    if is_anthropic_path(path):
        body = anthropic_error(error, RequestRecord.id_in(scope)).model_dump()
        return kind(body, anthropic_status(error), headers | anthropic_headers(error))
    if is_openai_path(path):
        return kind(openai_error(error).model_dump(), openai_status(error), headers)
    return kind(error_body(error).model_dump(), error.http_status, headers)


async def _on_serving_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    response = answer_to(error, request.scope)
    limits = getattr(request.state, LIMIT_HEADERS, None)  # of a caller that was let in
    response.headers.update(limits() if limits is not None else {})
    return response


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Answers the router's own errors."""
    assert isinstance(error, HTTPException)
    operation = f"{request.method} {request.url.path[:200]}"
    answered: ServingError = InvalidRequest(str(error.detail))
    if error.status_code == MethodNotAllowed.http_status:
        answered = MethodNotAllowed(f"{operation}: method not allowed here")
    if error.status_code == NotFound.http_status:
        text = "not found; chats go to POST /chat/completions, and GET /docs"
        answered = NotFound(f"{operation}: {text}")
    response = answer_to(answered, request.scope)
    response.headers.update(error.headers or {})
    return response


async def _on_query(request: Request, error: Exception) -> Response:
    """Answers a wrong value in the query, which FastAPI itself has read."""
    assert isinstance(error, RequestValidationError)
    return answer_to(refusal(error.errors()), request.scope)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """Ends a request whose client has gone away; nobody reads this answer."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_bug(request: Request, error: Exception) -> Response:
    """Answers an exception that is a bug of ours; the server logs its traceback."""
    failure = ServingError("the gateway failed; its log says why")
    response = answer_to(failure, request.scope)
    # The access log adds the id to all other answers, but this one is made outside of it.
    add_request_id(response.headers, request.scope["path"], RequestRecord.of(request).id)
    return response
