"""The application: what it imports, and pages of other origins."""

import subprocess
import sys

import httpx

from tests.support.fakes import running_stack
from tests.support.gateway import BEARER, chat_body, check_error


def test_the_gateway_needs_nothing_of_the_model() -> None:
    code = "import sys, serving.gateway.__main__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    names = set(loaded.stdout.decode().split())
    assert "serving.gateway.app" in names
    assert not names & {"jax", "flax", "numpy", "mixtral_jax", "convert", "serving.service.service"}


def test_pages_of_other_origins_may_ask_if_they_are_allowed(client: httpx.Client) -> None:
    asks = {"origin": "https://a.example", "access-control-request-method": "POST"}
    asks["access-control-request-headers"] = "authorization,content-type"
    check_error(client.options("/chat/completions", headers=asks), 405, "MethodNotAllowed")
    with running_stack(cors_origin=("https://a.example",)) as stack:
        url = f"{stack.url}/chat/completions"
        allowed = httpx.options(url, headers=asks)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        assert httpx.options(url, headers=asks | {"origin": "https://b.example"}).status_code == 400
        answer = httpx.post(url, json=chat_body("one"), headers=BEARER | {"origin": asks["origin"]})
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
