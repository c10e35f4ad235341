"""Requests as browsers, forged pages and other clients send them, and which of them are refused."""

import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from serving.access.credentials import Access
from serving.access.keyring import Keyring
from serving.access.loopback import is_loopback
from serving.errors import Forbidden, InvalidRequest, ServingError, UnsupportedMedia
from serving.gateway.http.origin import OriginCheck
from tests.support.fakes import KEY, PATIENCE, Stack, running_stack

JSON = {"content-type": "application/json"}
PAGE = "https://page.example"


def refusal(
    headers: dict[str, str] | list[tuple[str, str]],
    method: str = "POST",
    version: str = "1.1",
    is_open: bool = True,
    allowed: tuple[str, ...] = (),
) -> type[ServingError] | None:
    """The error by which a request is refused; None if it is handed on."""

    async def application(*_: Any) -> None:
        raise AssertionError

    pairs = list(headers.items()) if isinstance(headers, dict) else headers
    scope = {
        "type": "http",
        "method": method,
        "http_version": version,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in pairs],
    }
    check = OriginCheck(
        application, is_local=is_loopback if is_open else None, allowed_origins=allowed
    )
    try:
        check.check(scope)
    except ServingError as error:
        return type(error)
    return None


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8000", "127.0.0.1", "localhost:8000", "LocalHost", "127.9.9.9", "[::1]:8000"],
)
def test_hosts_of_this_machine(host: str) -> None:
    assert refusal({"host": host, **JSON}) is None


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"),
        *("192.168.1.5:8000", "0.0.0.0", "[fe80::1]", "127.1", "localhost."),
    ],
)
def test_other_hosts_are_of_a_name_that_was_made_to_resolve_here(host: str) -> None:
    assert refusal({"host": host, **JSON}) is Forbidden
    assert refusal({"host": host, **JSON}, is_open=False) is None


@pytest.mark.parametrize("host", ["", "a b", "localhost@evil.example", "a/b", "::1", "[::1", "x:y"])
def test_a_host_that_is_none(host: str) -> None:
    for is_open in (True, False):
        assert refusal({"host": host, **JSON}, is_open=is_open) is InvalidRequest


def test_every_request_of_http_1_1_names_its_host_once() -> None:
    twice = [("host", "localhost"), ("host", "localhost"), *JSON.items()]
    for is_open in (True, False):
        assert refusal(JSON, is_open=is_open) is InvalidRequest
        assert refusal(JSON, version="1.0", is_open=is_open) is None
        assert refusal(twice, is_open=is_open) is InvalidRequest
        assert refusal(twice, version="1.0", is_open=is_open) is InvalidRequest


# What browsers send: by a script, by a form, by an address that the user types, by a link.
PAGES: list[tuple[dict[str, str], str, type[ServingError] | None]] = [
    ({"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"}, "POST", None),
    ({"sec-fetch-site": "none"}, "GET", None),
    ({"origin": PAGE, "sec-fetch-site": "cross-site"}, "POST", Forbidden),
    ({"origin": PAGE, "sec-fetch-site": "cross-site"}, "OPTIONS", Forbidden),
    ({"origin": PAGE}, "POST", Forbidden),  # a browser without Fetch Metadata
    ({"origin": "null"}, "POST", Forbidden),  # a page in a sandbox, or a file
    ({"origin": "http://127.0.0.1:9000", "sec-fetch-site": "same-site"}, "POST", Forbidden),
    ({"origin": "http://localhost:8000"}, "POST", Forbidden),
    ({"origin": ""}, "POST", Forbidden),
    ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, "GET", Forbidden),
    ({"sec-fetch-site": "same-site"}, "GET", Forbidden),
    ({"sec-fetch-site": "made up"}, "GET", Forbidden),
]


@pytest.mark.parametrize(("headers", "method", "expected"), PAGES)
def test_pages(headers: dict[str, str], method: str, expected: type[ServingError] | None) -> None:
    whole = {"host": "127.0.0.1:8000", **JSON, **headers}
    assert refusal(whole, method) is expected
    # A key is nothing that a foreign page has.
    assert refusal(whole, method, is_open=False) is None
    assert refusal(whole, method, allowed=("*",)) is None


def test_an_allowed_origin_is_that_one_only() -> None:
    page = {"host": "localhost", "origin": PAGE, "sec-fetch-site": "cross-site", **JSON}
    assert refusal(page, allowed=(PAGE,)) is None
    for other in ("https://page.example.evil", "http://page.example", f"{PAGE}:444", PAGE.upper()):
        assert refusal(page, allowed=(other,)) is Forbidden
    # An allowed page does not make a foreign name one of this machine.
    assert refusal(page | {"host": "evil.example"}, allowed=("*",)) is Forbidden


@pytest.mark.parametrize(
    ("kind", "is_read"),
    [
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("application/vnd.api+json", True),
        (None, False),
        ("", False),
        ("text/plain", False),
        ("text/plain; application/json", False),
        ("application/x-www-form-urlencoded", False),
        ("multipart/form-data; boundary=+json", False),
        ("application/json, text/plain", False),
    ],
)
def test_bodies_that_a_page_may_send_unasked(kind: str | None, is_read: bool) -> None:
    headers = {"host": "localhost"} | ({} if kind is None else {"content-type": kind})
    assert refusal(headers) is (None if is_read else UnsupportedMedia)
    assert refusal(headers, "GET") is None
    assert refusal(headers, is_open=False) is None


def test_over_sockets() -> None:
    body = {"messages": [{"role": "user", "content": "one two"}]}
    open_access = Access(Keyring({}), is_open=True)
    with (
        running_stack(access=open_access) as stack,
        httpx.Client(base_url=stack.url, timeout=PATIENCE) as client,
    ):
        assert client.post("/chat/completions", json=body).status_code == 200
        page = {"origin": PAGE, "sec-fetch-site": "cross-site"}
        refused = client.post("/chat/completions", json=body, headers=page)
        assert refused.status_code == 403
        assert refused.headers["x-ms-error-code"] == refused.json()["error"]["code"]
        assert refused.headers["x-request-id"]
        assert "access-control-allow-origin" not in refused.headers
        assert client.get("/info", headers={"host": "evil.example"}).status_code == 403
        untyped = client.post("/chat/completions", content=b"{}")
        assert untyped.status_code == 415
        assert client.get("/health/live").status_code == 200
    with running_stack() as stack, httpx.Client(base_url=stack.url, timeout=PATIENCE) as client:
        headers = {"api-key": KEY, "host": "evil.example", "origin": PAGE}
        assert client.get("/info", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET /health/live HTTP/1.1\r\n", 400),
        ("GET /health/live HTTP/1.1\r\nHost: a\r\nHost: a\r\n", 400),
        ("GET /health/live HTTP/1.1\r\nHost:\r\n", 400),
        ("GET http://a/health/live HTTP/1.1\r\n", 400),
        ("GET /nowhere HTTP/1.1\r\n", 400),
        ("GET /health/live HTTP/1.1\r\nHost: a\r\n", 200),
        ("GET /health/live HTTP/1.0\r\n", 200),
    ],
)
def test_hosts_on_the_wire(stack: Stack, head: str, status: int) -> None:
    address = urlsplit(stack.url)
    with socket.create_connection((address.hostname, address.port), PATIENCE) as connection:
        connection.sendall(f"{head}Connection: close\r\n\r\n".encode())
        answer = b""
        while more := connection.recv(65536):
            answer += more
    assert answer.split(b" ")[1] == str(status).encode(), answer
    if status == 400:
        assert b"Host: NAME" in answer and b"x-request-id: " in answer


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as stack:
        yield stack
