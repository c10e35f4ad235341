"""A path before all routes, under which a proxy publishes the server: --root-path."""

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class RootPath:
    """Takes the path off requests, so that all behind it sees the routes as they are written.

    Requests without it, of proxies that take it off themselves and of health checks, pass as they
    are. The path without its last slash leads a browser to the one with it, under which the page's
    files are found. An ASGI middleware, outermost.

    Args:
        app: The application behind it.
        root_path: Begins with a slash and ends with none, such as "/models/mixtral".
    """

    def __init__(self, app: ASGIApp, *, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands a request on, with its own path."""
        if scope["type"] == "http" and scope["path"].startswith(f"{self._root_path}/"):
            scope["path"] = scope["path"].removeprefix(self._root_path)
            raw = scope.get("raw_path")
            if raw is not None:
                scope["raw_path"] = raw.removeprefix(self._root_path.encode())
        elif scope["type"] == "http" and _is_read(scope) and scope["path"] == self._root_path:
            await RedirectResponse(f"{self._root_path}/")(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _is_read(scope: Scope) -> bool:
    return scope["method"] in ("GET", "HEAD")
