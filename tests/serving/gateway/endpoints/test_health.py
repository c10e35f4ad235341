"""Whether the server lives, under the names of other servers; no key is asked for."""

from importlib.metadata import version

import httpx
import pytest

from tests.support.fakes import PATIENCE, Stack, running_stack
from tests.support.gateway import check_error


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")]
)
def test_health_is_readiness(method: str, path: str) -> None:
    # A service of its own: others would hear a moment late that theirs serves again.
    with running_stack() as stack, httpx.Client(base_url=stack.url, timeout=PATIENCE) as client:
        answer = client.request(method, path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
        stack.set_serving(False)
        check_error(client.request(method, path), 503, "ServiceUnavailable")


def test_the_version_is_the_packages(stack: Stack) -> None:
    answer = httpx.get(f"{stack.url}/version")
    assert (answer.status_code, answer.json()) == (200, {"version": version("mixtral-jax")})
