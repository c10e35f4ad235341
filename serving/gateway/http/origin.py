"""Checks of a request's Host, Origin and type, before anything else of it is read.

RFC 9112 (3.2) has every request of HTTP/1.1 name the server that it is for, once. A server that
lets everybody in (`--no-auth`) listens on this machine only, but the browser of a person at this
machine runs pages of strangers. Such a page must neither drive the model nor read its answers:

- it may send a request to any address, so requests that a browser calls foreign (`Origin`, and
  `Sec-Fetch-Site` of the W3C's Fetch Metadata) are refused unless `--cors-origin` allows the page;
- it may have its own name resolve to this machine and so call itself at home (DNS rebinding), so
  `Host` must be a name or an address of this machine;
- it may send a body of no type, or of a form's, without the browser's question whether it may
  (CORS, simple requests), so a body must be of a type of JSON.
"""

import re
from collections.abc import Callable, Collection

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import Forbidden, InvalidRequest, ServingError, UnsupportedMedia
from serving.gateway.http.failures import answer_to
from serving.gateway.http.request_record import RequestRecord

_WITH_BODY = {"POST", "PUT", "PATCH"}
# RFC 3986: an IPv6 address in brackets, or a name or an IPv4 address; and a port.
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._~-]+))(?::\d{0,5})?")
_JSON = re.compile(r"application/(?:json|[a-z0-9!#$&^_.-]+\+json)")
_OWN_SITE = {"same-origin", "none"}  # none: typed by the user, or of a program


class OriginCheck:
    """Refuses requests without a host and, where everybody is let in, those of foreign pages.

    An ASGI middleware. It stands inside the access log, which notes what is refused and why.

    Args:
        app: The application behind it.
        is_local: Returns True for a name or an address that only this machine can reach; None:
            callers present keys, which no foreign page has, and only the host must be there.
        allowed_origins: Origins such as "https://example.org" whose pages may ask; "*": all.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        is_local: Callable[[str], bool] | None,
        allowed_origins: Collection[str] = (),
    ) -> None:
        self._app = app
        self._is_local = is_local
        self._allowed = frozenset(allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a refused request, and hands every other one on."""
        if scope["type"] == "http":
            try:
                self.check(scope)
            except ServingError as error:
                RequestRecord.of(Request(scope)).reason = str(error)
                await answer_to(error, scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def check(self, scope: Scope) -> None:
        """Checks a request in ASGI's form.

        Raises:
            InvalidRequest: It names no host, several, or a malformed one.
            Forbidden: Everybody is let in, and it is of a foreign page, or for a foreign host.
            UnsupportedMedia: Everybody is let in, and its body is not of a type of JSON.
        """
        headers = Headers(scope=scope)
        host = _host_of(headers, scope["http_version"])
        if self._is_local is None:
            return
        if host is not None and not self._is_local(host):
            raise Forbidden(
                f"this server runs with --no-auth and is not known as {host[:100]!r}; ask it by an "
                "address of its own machine, such as 127.0.0.1"
            )
        self._check_page(headers)
        if scope["method"] in _WITH_BODY:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if not _JSON.fullmatch(kind):
                raise UnsupportedMedia(
                    "a server that runs with --no-auth reads JSON only; send the header "
                    "'Content-Type: application/json'"
                )

    def _check_page(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if "*" in self._allowed or origin in self._allowed:
            return
        is_own = origin is None or origin.partition("://")[2] == headers.get("host")
        if not (is_own and headers.get("sec-fetch-site", "none") in _OWN_SITE):
            raise Forbidden(
                f"this server runs with --no-auth and takes no requests of pages of "
                f"{(origin or 'another site')[:100]!r}; --cors-origin allows an origin"
            )


def _host_of(headers: Headers, http_version: str) -> str | None:
    """Returns the name or address in Host, in lower case; None if a client of HTTP/1.0 has none.

    Raises InvalidRequest.
    """
    hosts = headers.getlist("host")
    if not hosts and http_version == "1.0":
        return None
    match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    if match is None:
        raise InvalidRequest("the request must have one header 'Host: NAME' or 'Host: NAME:PORT'")
    return (match.group(1) or match.group(2)).lower()
