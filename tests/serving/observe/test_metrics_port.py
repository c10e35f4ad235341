"""The port for Prometheus, on an address of choice."""

import re
import socket

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from serving.errors import SetupError
from serving.observe.metrics_port import serve_metrics


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
def test_metrics_are_served_at_the_address_alone(host: str) -> None:
    registry = CollectorRegistry()
    Counter("apples", "Apples.", registry=registry).inc(3)
    url = serve_metrics(registry, host, 0)
    assert re.fullmatch(rf"http://{re.escape(host)}:\d+/metrics", url)
    assert "apples_total 3.0" in httpx.get(url, trust_env=False).text
    if host != "127.0.0.1":
        with pytest.raises(httpx.ConnectError):
            httpx.get(url.replace(host, "127.0.0.1"), trust_env=False)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SetupError, match=rf"127\.0\.0\.1:{port} .*--metrics-port"):
            serve_metrics(CollectorRegistry(), "127.0.0.1", port)
