"""Who may ask, as a dependency of the routes: serving/access.py decides."""

from fastapi import Request

from serving.access.credentials import Access


async def require(request: Request) -> None:
    """Lets the request in and notes the Caller as `request.state.caller`, or raises.

    It is a coroutine, so that no thread is taken for it. The application's `state.access` decides.
    """
    access: Access = request.app.state.access
    request.state.caller = await access.admit(request.headers)
