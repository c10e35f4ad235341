"""Authentication as a dependency of the routes; serving/access decides who may ask."""

from fastapi import Request

from serving.access.credentials import Access
from serving.errors import ServingError
from serving.gateway.http.request_record import RequestRecord


async def require(request: Request) -> None:
    """Lets the request in, and sets its Caller as `request.state.caller`.

    The application's `state.access` decides. It is a coroutine, so that no thread is taken for it.

    Raises:
        ServingError: The caller may not ask, or that cannot be found out now.
    """
    access: Access = request.app.state.access
    try:
        request.state.caller = await access.admit(request.headers)
    except ServingError as error:
        RequestRecord.of(request).reason = str(error)  # for the access log
        raise
