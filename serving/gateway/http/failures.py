"""Every answer that is not 2xx: an error of serving/errors.py in one shape, with its headers."""

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
from serving.gateway.dialect.error_body import error_body
from serving.gateway.dialect.parsing import refusal
from serving.gateway.http.body import BodyTooSlow, Lingering
from serving.gateway.http.request_record import RequestRecord


def answer_failures(app: FastAPI) -> None:
    """Has the application answer every failure in the one shape."""
    app.add_exception_handler(ServingError, _on_serving_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_query)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_bug)


async def refuse_while_draining(scope: Scope, receive: Receive, send: Send) -> None:
    """The answer to whoever comes when the gateway is about to end."""
    error = Unavailable("this server is shutting down; send the request again, to another one")
    response = answer_to(error)
    response.headers["connection"] = "close"
    await response(scope, receive, send)


def answer_to(error: ServingError) -> Response:
    """The answer that tells a client of an error."""
    headers = {"x-ms-error-code": error.azure_code}
    if error.retry_after is not None:
        # Clients of Azure's repeat whatever carries this header, so nothing else may.
        headers["retry-after"] = str(error.retry_after)
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, EngineFailure):
        headers["ms-azureml-model-error-reason"] = "model_error"
        headers["ms-azureml-model-error-statuscode"] = "500"
    # What the client has not sent yet shall not be waited for.
    kind = Lingering if isinstance(error, (RequestTooLarge, BodyTooSlow)) else JSONResponse
    return kind(error_body(error).model_dump(), error.http_status, headers)


async def _on_serving_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return answer_to(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """The router's own errors."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]}"
    ours: ServingError = InvalidRequest(str(error.detail))
    if error.status_code == MethodNotAllowed.http_status:
        ours = MethodNotAllowed(f"{what}: method not allowed here")
    if error.status_code == NotFound.http_status:
        ours = NotFound(f"{what}: not found; chats go to POST /chat/completions, and GET /docs")
    response = answer_to(ours)
    response.headers.update(error.headers or {})
    return response


async def _on_query(request: Request, error: Exception) -> Response:
    """A value in the query that FastAPI itself has read."""
    assert isinstance(error, RequestValidationError)
    return answer_to(refusal(error.errors()))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """Nobody is there to read it."""
    return Response(status_code=499)


async def _on_bug(request: Request, error: Exception) -> Response:
    """An exception that is nobody's but ours; the server logs its traceback."""
    response = answer_to(ServingError("the gateway failed; its log says why"))
    # It is answered outside of what adds it to all other answers.
    response.headers["x-request-id"] = RequestRecord.of(request).id
    return response
