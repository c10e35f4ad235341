"""`mixtral-jax serve` watched from outside, by its flags: metrics, logs, usage, spans."""

import http.server
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support.servers import COMMAND, Server, free_ports, running, serve_command

pytestmark = pytest.mark.slow
PATIENCE = 60.0


class Collector:
    """A collector of OpenTelemetry spans: (service, name of the span)."""

    def __init__(self) -> None:
        self.spans: set[tuple[str, str]] = set()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.take(self.path, body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def take(self, path: str, body: bytes) -> None:
        assert path == "/v1/traces"
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            named = {each.key: each.value.string_value for each in group.resource.attributes}
            for scope in group.scope_spans:
                self.spans |= {(named["service.name"], span.name) for span in scope.spans}


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever, daemon=True)
    thread.start()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()
    thread.join(PATIENCE)


def ask(server: Server, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    headers = {"authorization": f"Bearer {server.key}"}
    with httpx.Client(headers=headers, timeout=PATIENCE, trust_env=False) as client:
        return client.post(server.url + path, json=body) if body else client.get(server.url + path)


def chat(text: str, max_tokens: int) -> dict[str, Any]:
    message = {"role": "user", "content": text}
    return {"messages": [message], "max_tokens": max_tokens, "ignore_eos": True}


def until(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def gateway_of(server: Server) -> psutil.Process:
    (gateway,) = [
        child
        for child in psutil.Process(server.process.pid).children()
        if "serving.gateway" in child.cmdline()
    ]
    return gateway


def is_live(server: Server) -> bool:
    try:
        return ask(server, "/health/live").status_code == 200
    except httpx.TransportError:
        return False


def test_everything_that_watches(tmp_path: Path, collector: Collector) -> None:
    port, grpc_port, engine_port, gateway_port = map(str, free_ports(4))
    command = [COMMAND, "serve", "--model=tiny-random", "--port", port, "--grpc-port", grpc_port]
    command += ["--metrics-port", engine_port, "--gateway-metrics-port", gateway_port]
    command += ["--otlp-endpoint", collector.url, "--log-format=json"]
    command += ["--usage-db", str(tmp_path / "usage.db"), "--max-tokens-per-minute=6000"]
    with running(command) as server:
        answer = ask(server, "/v1/chat/completions", chat("pineapple", 7))
        usage = answer.json()["usage"]
        assert usage["completion_tokens"] == 7

        # Each process has its own figures; the last token may be counted when the answer has gone.
        def texts() -> list[str]:
            urls = [f"http://127.0.0.1:{number}/metrics" for number in (engine_port, gateway_port)]
            return [httpx.get(url, trust_env=False, timeout=PATIENCE).text for url in urls]

        engine_figure = 'vllm:generation_tokens_total{model_name="tiny-random"} 7.0'
        until(lambda: engine_figure in texts()[0])
        until(lambda: 'mixtral_gateway_tokens_total{kind="completion"} 7.0' in texts()[1])
        assert all("\nmixtral_keys_reload_failed 0.0\n" in text for text in texts())

        # What was used survives the gateway, by all but its last second.
        (row,) = ask(server, "/usage").json()["data"]  # which also writes it
        assert (row["caller"], row["requests"], row["completion_tokens"]) == ("default", 1, 7)
        # The line of a request is written when its answer has gone, which may be after this.
        until(lambda: any("/usage" in line for line in list(server.said)))
        gateway_of(server).send_signal(signal.SIGKILL)
        until(lambda: is_live(server))
        assert ask(server, "/usage").json()["data"] == [row]

        # The new gateway sends its own spans too.
        assert ask(server, "/v1/chat/completions", chat("x", 1)).status_code == 200
        assert server.stop(signal.SIGTERM) == 0

    lines = [json.loads(line) for line in server.said if line.startswith("{")]
    told = [line for line in lines if line["message"] == "request" and line["status"] == 200]
    assert [line.get("completion_tokens") for line in told] == [7, None, None, 1]
    assert told[0]["id"] == answer.headers["x-request-id"]
    assert not any("pineapple" in line for line in server.said)
    assert {
        ("mixtral-jax-gateway", "POST /v1/chat/completions"),
        ("mixtral-jax-gateway", "chat tiny-random"),
        ("mixtral-jax-service", "mixtral.v1.Inference/Generate"),
        ("mixtral-jax-service", "decode"),
    } <= collector.spans


def test_a_stream_in_the_queue_says_that_it_lives() -> None:
    """A second stream waits for the only row of the engine, and has heartbeats meanwhile."""
    options = ("--max-sequences=1", "--max-step-tokens=8")  # little to compile
    options += ("--heartbeat-seconds=0.05", "--metrics-host=127.0.0.2")
    port = free_ports(1)[0]
    with running(serve_command("tiny-random", *options, f"--metrics-port={port}")) as server:
        headers = {"authorization": f"Bearer {server.key}"}
        url = f"{server.url}/v1/chat/completions"
        with (
            httpx.Client(headers=headers, timeout=PATIENCE, trust_env=False) as client,
            client.stream("POST", url, json=chat("x", 400) | {"stream": True, "n": 16}) as first,
        ):
            spoken = first.iter_lines()
            while '"content":""' in (line := next(spoken)) or not line:
                pass  # until the first text
            with client.stream("POST", url, json=chat("y", 2) | {"stream": True}) as second:
                lines = [line for line in second.iter_lines() if line]
            assert second.status_code == 200
        role, beat, *_ = map(json.loads, (line.removeprefix("data: ") for line in lines[:-1]))
        assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert beat["choices"] == [] and "usage" not in beat
        assert lines[-1] == "data: [DONE]"
        url = f"http://127.0.0.2:{port}/metrics"
        metrics = httpx.get(url, trust_env=False, timeout=PATIENCE).text
        assert "vllm:generation_tokens_total" in metrics
