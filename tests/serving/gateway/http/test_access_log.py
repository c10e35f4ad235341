"""The records of requests: log, metrics, accounts and spans, before a service of known answers."""

import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serving.access.caller import CallerLimits
from serving.access.credentials import Access
from serving.access.keyring import Keyring
from serving.accounting.accounts import Accounts
from serving.accounting.ledger import UsageLedger
from serving.accounting.rate_limits import RateLimits
from serving.gateway.http.access_log import LOGGER
from serving.gateway.http.drain import Drain
from serving.gateway.http.failures import refuse_while_draining
from serving.gateway.http.metrics import GatewayMetrics
from serving.observe.logs import JsonFormatter
from serving.observe.tracing import Traces
from tests.support.fakes import KEY, PATIENCE, Stack, running_stack
from tests.support.gateway import address

ALICE = {"authorization": "Bearer alices-key"}
OPERATOR = {"authorization": f"Bearer {KEY}"}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "pineapple"


class Watched:
    """A stack, and everything that it records."""

    def __init__(
        self, stack: Stack, metrics: GatewayMetrics, exporter: InMemorySpanExporter
    ) -> None:
        self.stack = stack
        self.metrics = metrics
        self._exporter = exporter

    def post(self, path: str, /, *, headers: dict[str, str] = ALICE, **body: Any) -> httpx.Response:
        """One request, all of whose answer is read."""
        url = f"{self.stack.url}{path}"
        return httpx.post(url, json=body, headers=headers, timeout=PATIENCE, trust_env=False)

    def chat(self, text: str, **parameters: Any) -> httpx.Response:
        return self.post(
            "/v1/chat/completions", messages=[{"role": "user", "content": text}], **parameters
        )

    def get(self, path: str, headers: dict[str, str] = ALICE) -> httpx.Response:
        return httpx.get(f"{self.stack.url}{path}", headers=headers, trust_env=False)

    def figures(self) -> dict[tuple[str, ...], float]:
        """Value by (name, label values...), all but buckets and the times of creation."""
        names = ("route", "status", "outcome", "kind")
        text = generate_latest(self.metrics.registry).decode()
        return {
            (
                sample.name.removeprefix("mixtral_gateway_"),
                *(sample.labels[name] for name in names if name in sample.labels),
            ): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if "le" not in sample.labels and not sample.name.endswith("_created")
        }

    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self._exporter.get_finished_spans()}


@pytest.fixture
def watched(request: pytest.FixtureRequest) -> Iterator[Watched]:
    wishes: dict[str, Any] = getattr(request, "param", {})
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    drain = Drain(refuse_while_draining, refuse_while_draining, 0.0)
    if wishes.get("drains"):
        drain.begin()
    parts = {
        "drain": drain,
        "accounts": Accounts(
            # Nothing comes back between two requests of a test.
            RateLimits(wishes.get("limits", CallerLimits()), clock=lambda: 1000.0),
            UsageLedger(),
        ),
        "metrics": (metrics := GatewayMetrics()),
        "traces": Traces(provider),
    }
    access = Access(Keyring({"default": KEY, "alice": "alices-key"}))
    with running_stack(
        access=access, parts=parts, log_prompts=wishes.get("log_prompts", False)
    ) as stack:
        yield Watched(stack, metrics, exporter)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, Any]]]:
    """The lines of the access log as JSON; the list grows."""
    found: list[dict[str, Any]] = []
    formatter = JsonFormatter()

    class Reader(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(json.loads(formatter.format(record)))

    reader = Reader()
    logger = logging.getLogger(LOGGER)
    with caplog.at_level(logging.INFO, logger.name):
        logger.addHandler(reader)
        yield found
        logger.removeHandler(reader)


def until(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def test_finish_reasons_of_many_choices_are_counted(
    watched: Watched, lines: list[dict[str, Any]]
) -> None:
    prompts = ["one"] * 40 + ["one two"] * 3
    response = watched.post("/v1/completions", prompt=prompts, max_tokens=1)
    assert response.status_code == 200
    until(lambda: lines)
    assert lines[0]["finish"] == "3 x length,40 x stop"


def test_a_chat_in_the_log_the_metrics_and_the_accounts(
    watched: Watched, lines: list[dict[str, Any]]
) -> None:
    response = watched.chat(f"one {SECRET} three", max_tokens=2, temperature=0.7, n=2)
    assert response.status_code == 200 and SECRET in response.text
    until(lambda: lines)
    (line,) = lines
    assert line.pop("seconds") >= line.pop("first_token_seconds") > 0
    del line["time"]
    assert line == {
        "level": "INFO",
        "logger": "serving.gateway.http.access_log",
        "message": "request",
        "id": response.headers["x-request-id"],
        "client": "127.0.0.1",
        "caller": "alice",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "outcome": "whole",
        "model": "scripted-7B",
        "prompt_tokens": 1,
        "completion_tokens": 4,
        "finish": "length,length",
    }
    assert response.json()["id"] == "chatcmpl-" + response.headers["x-request-id"]
    assert watched.stack.service.metadata[0]["x-request-id"] == response.headers["x-request-id"]

    route = "/v1/chat/completions"
    figures = watched.figures()
    assert figures["requests_total", route, "200", "whole"] == 1
    assert figures["first_byte_seconds_count", route] == 1
    assert figures["request_seconds_count", route] == 1
    assert figures["tokens_total", "prompt"] == 1
    assert figures["tokens_total", "completion"] == 4
    assert figures[("open_requests",)] == figures[("open_streams",)] == 0
    assert watched.get("/usage").json() == {
        "object": "list",
        "data": [
            {
                "caller": "alice",
                "day": today(),
                "requests": 1,
                "prompt_tokens": 1,
                "cached_tokens": 0,
                "completion_tokens": 4,
            }
        ],
    }


def test_an_adapter_is_named_in_the_log_in_spans_and_in_usage(
    watched: Watched, lines: list[dict[str, Any]]
) -> None:
    watched.stack.service.adapters = {"tuned": "ab" * 32}
    for model in ("tuned", "scripted-7B", "nobody", "tuned"):
        watched.chat("a b", model=model)
    until(lambda: len(lines) == 4)
    assert [(line["status"], line["model"]) for line in lines] == [
        (200, "tuned"),
        (200, "scripted-7B"),
        (404, "scripted-7B"),
        (200, "tuned"),
    ]
    assert lines[2]["error"] == "unknown_model"
    attributes = watched.spans()["chat scripted-7B"].attributes or {}  # of the last one
    assert attributes["gen_ai.response.model"] == attributes["gen_ai.request.model"] == "tuned"
    (day,) = watched.get("/usage").json()["data"]
    assert (day["requests"], day["completion_tokens"]) == (3, 6)
    assert day["adapters"] == [
        {
            "adapter": "tuned",
            "requests": 2,
            "prompt_tokens": 2,
            "cached_tokens": 0,
            "completion_tokens": 4,
        }
    ]


def test_the_spans_of_a_chat(watched: Watched) -> None:
    response = watched.post(
        "/openai/deployments/azureai/chat/completions",
        headers=ALICE | {"traceparent": f"00-{TRACE}-{PARENT}-01"},
        messages=[{"role": "user", "content": SECRET}],
        model="mistral-small",
        max_tokens=9,
        temperature=0.7,
        top_p=0.5,
        seed=3,
        stop=["pear"],
        stream=True,
    )
    assert response.text.endswith("data: [DONE]\n\n")
    until(lambda: len(watched.spans()) == 2)
    outer = watched.spans()["POST /openai/deployments/{name}/chat/completions"]
    inner = watched.spans()["chat scripted-7B"]
    assert outer.context and outer.parent and inner.context and inner.parent
    assert f"{outer.context.trace_id:032x}" == TRACE
    assert f"{outer.parent.span_id:016x}" == PARENT
    assert inner.parent.span_id == outer.context.span_id
    (metadata,) = watched.stack.service.metadata
    assert metadata["traceparent"] == f"00-{TRACE}-{inner.context.span_id:016x}-01"
    assert (outer.kind.name, inner.kind.name) == ("SERVER", "CLIENT")
    host, _, port = watched.stack.target.rpartition(":")
    assert dict(inner.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "mixtral_jax",
        "gen_ai.output.type": "text",
        "gen_ai.request.model": "azureai",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.7,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.response.model": "scripted-7B",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 1,
        "gen_ai.usage.output_tokens": 1,
        "server.address": host,
        "server.port": int(port),
    }
    assert dict(outer.attributes or {}) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/openai/deployments/{name}/chat/completions",
        "url.path": "/openai/deployments/azureai/chat/completions",
        "url.scheme": "http",
        "mixtral.request.id": response.headers["x-request-id"],
    }


def test_several_prompts_are_one_request(watched: Watched, lines: list[dict[str, Any]]) -> None:
    watched.post("/v1/completions", prompt=["one two", "three"])
    until(lambda: lines)
    assert (lines[0]["prompt_tokens"], lines[0]["completion_tokens"]) == (2, 3)
    (row,) = watched.get("/usage").json()["data"]
    assert (row["requests"], row["prompt_tokens"], row["completion_tokens"]) == (1, 2, 3)
    assert {"text_completion scripted-7B", "POST /v1/completions"} <= set(watched.spans())


def test_a_dropped_stream_is_charged(watched: Watched, lines: list[dict[str, Any]]) -> None:
    body = {"messages": [{"role": "user", "content": "one two !wait three"}], "stream": True}
    url = f"{watched.stack.url}/v1/chat/completions"
    with (
        httpx.Client(headers=ALICE, timeout=PATIENCE, trust_env=False) as client,
        client.stream("POST", url, json=body) as response,
    ):
        text = response.iter_text()
        until(lambda: "two" in next(text))
        assert watched.figures()[("open_streams",)] == 1
    until(lambda: lines)
    (line,) = lines
    assert (line["status"], line["outcome"], line["finish"]) == (200, "dropped", "")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (1, 2)
    figures = watched.figures()
    assert figures["requests_total", "/v1/chat/completions", "200", "dropped"] == 1
    assert figures[("open_streams",)] == figures[("open_requests",)] == 0
    (row,) = watched.get("/usage").json()["data"]
    assert (row["prompt_tokens"], row["completion_tokens"]) == (1, 2)
    span = watched.spans()["chat scripted-7B"]
    assert (span.attributes or {})["error.type"] == "dropped"


def test_a_broken_stream_is_charged(watched: Watched, lines: list[dict[str, Any]]) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        watched.chat("one !fail:EngineFailure", stream=True)
    until(lambda: lines)
    (line,) = lines
    assert (line["level"], line["outcome"], line["error"]) == ("WARNING", "broken", "ModelError")
    assert line["reason"] == "EngineFailure was asked for"
    assert (line["prompt_tokens"], line["completion_tokens"]) == (1, 1)
    assert watched.get("/usage").json()["data"][0]["completion_tokens"] == 1
    span = watched.spans()["chat scripted-7B"]
    assert (span.attributes or {})["error.type"] == "ModelError"


@pytest.mark.parametrize(
    ("path", "headers", "status", "route", "caller"),
    [
        ("/v1/chat/completions", {}, 401, "/v1/chat/completions", None),
        ("/v1/chat/completions", ALICE, 400, "/v1/chat/completions", "alice"),
        ("/chat/completions", ALICE, 422, "/chat/completions", "alice"),
        ("/nowhere%0a", ALICE, 404, "other", None),
        ("/info", ALICE, 405, "other", None),
    ],
)
def test_what_is_refused_costs_nothing(
    watched: Watched,
    lines: list[dict[str, Any]],
    path: str,
    headers: dict[str, str],
    status: int,
    route: str,
    caller: str | None,
) -> None:
    response = watched.post(path, headers=headers, messages=3)
    assert response.status_code == status
    until(lambda: lines)
    (line,) = lines
    assert (line["status"], line.get("caller")) == (status, caller)
    assert line["error"] == response.headers["x-ms-error-code"]
    assert line["id"] == response.headers["x-request-id"]
    counted = {key: value for key, value in watched.figures().items() if key[0] == "requests_total"}
    assert sum(counted.values()) == 1
    assert {key[2] for key in counted} == {str(status)}
    assert watched.get("/usage").json()["data"] == []


def test_a_request_that_cannot_be_read_is_seen(
    watched: Watched, lines: list[dict[str, Any]]
) -> None:
    with socket.create_connection(address(watched.stack), timeout=PATIENCE) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 400 ")
    until(lambda: lines)
    (line,) = lines
    assert (line["client"], line["status"], line["outcome"]) == ("127.0.0.1", 400, "refused")
    assert (line["error"], line["reason"]) == ("BadRequest", "this is not a request in HTTP/1.1")
    assert watched.figures()["requests_total", "other", "400", "refused"] == 1


@pytest.mark.parametrize("watched", [{"drains": True}], indirect=True)
def test_a_refusal_while_it_drains_is_seen(watched: Watched, lines: list[dict[str, Any]]) -> None:
    refused = watched.chat("one")
    assert refused.status_code == 503 and refused.headers["connection"] == "close"
    until(lambda: lines)
    (line,) = lines
    assert line["id"] == refused.headers["x-request-id"]
    assert (line["status"], line["error"]) == (503, "ServiceUnavailable")
    assert watched.figures()["requests_total", "other", "503", "whole"] == 1


def test_a_stranger_leaves_no_span(watched: Watched, lines: list[dict[str, Any]]) -> None:
    asking = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    assert watched.get("/info", headers=asking).status_code == 401
    assert watched.get("/nowhere", headers=asking).status_code == 404
    assert watched.get("/docs").status_code == 200
    until(lambda: len(lines) == 3)
    assert set(watched.spans()) == {"GET /docs"}


def test_an_error_of_the_service_costs_nothing(watched: Watched) -> None:
    assert watched.chat("!fail:ContextTooLong").status_code == 400
    assert watched.get("/usage").json()["data"] == []


def test_health_is_not_logged(watched: Watched, lines: list[dict[str, Any]]) -> None:
    for path in ("/health/live", "/health/ready", "/health", "/ping"):
        assert watched.get(path).status_code == 200
    watched.get("/info")
    until(lambda: lines)
    assert [line["path"] for line in lines] == ["/info"]
    assert set(watched.spans()) == {"GET /info"}
    assert watched.figures()["requests_total", "/health/live", "200", "whole"] == 1


def test_no_text_is_told(watched: Watched, lines: list[dict[str, Any]]) -> None:
    for stream in (False, True):
        watched.chat(SECRET, stream=stream)
        watched.post("/v1/completions", prompt=SECRET, stream=stream)
    until(lambda: len(lines) == 4 and len(watched.spans()) == 4)
    assert SECRET not in json.dumps(lines)
    assert SECRET not in "".join(span.to_json() for span in watched.spans().values())


@pytest.mark.parametrize("watched", [{"log_prompts": True}], indirect=True)
def test_text_is_told_if_asked_for(watched: Watched, lines: list[dict[str, Any]]) -> None:
    watched.chat("one two", n=2)
    watched.post("/v1/completions", prompt=["three", [4, 5]])
    until(lambda: len(lines) == 2)
    assert lines[0]["prompts"] == [[["user", "one two"]]]
    assert lines[0]["answers"] == [["one two", "one two"]]
    assert lines[1]["prompts"] == ["three", [4, 5]]
    assert lines[1]["answers"] == [["three"], ["4 5"]]


@pytest.mark.parametrize(
    "watched", [{"limits": CallerLimits(requests_per_minute=2)}], indirect=True
)
def test_too_many_requests(watched: Watched, lines: list[dict[str, Any]]) -> None:
    assert [watched.chat("x").status_code for _ in range(2)] == [200, 200]
    refused = watched.chat("x")
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "30"  # one comes back every 30 seconds
    assert refused.headers["x-ms-error-code"] == "TooManyRequests"
    assert "2 requests a minute" in refused.json()["error"]["message"]
    body = {"messages": [{"role": "user", "content": "x"}]}
    assert watched.post("/v1/chat/completions", headers=OPERATOR, **body).status_code == 200
    assert watched.get("/info").status_code == 200  # only answers are counted
    assert watched.get("/usage").json()["data"][0]["requests"] == 2


@pytest.mark.parametrize("watched", [{"limits": CallerLimits(tokens_per_minute=60)}], indirect=True)
def test_too_many_tokens(watched: Watched) -> None:
    assert watched.chat("w " * 49).status_code == 200  # 50 with the prompt
    refused = watched.chat("x")  # without max_tokens it may become anything: all 60 are reserved
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "50"
    assert watched.chat("x", max_tokens=2).status_code == 200
    too_long = watched.chat("x", max_tokens=60)
    assert too_long.status_code == 400 and "retry-after" not in too_long.headers
    assert "60 tokens a minute" in too_long.json()["error"]["message"]


def test_usage_of_everybody_is_for_the_operator(watched: Watched) -> None:
    watched.chat("one")
    assert watched.get("/usage", headers={}).status_code == 401
    assert watched.get("/usage", headers=OPERATOR).json()["data"] == []
    everybody = watched.get("/usage?all=true", headers=OPERATOR).json()["data"]
    assert [row["caller"] for row in everybody] == ["alice"]
    refused = watched.get("/usage?all=true")
    assert refused.status_code == 403
    assert refused.headers["x-ms-error-code"] == "Forbidden"
    assert watched.get("/usage?all=perhaps").status_code == 422


def test_every_metric_is_documented(watched: Watched, lines: list[dict[str, Any]]) -> None:
    watched.chat("x")
    until(lambda: lines)
    documented = (Path(__file__).parents[4] / "docs" / "operate.md").read_text(encoding="utf-8")
    names = {re.sub("_(sum|count)$", "", name) for name, *_ in watched.figures()}
    assert len(names) == 11
    own = {name if name.startswith("mixtral_") else f"mixtral_gateway_{name}" for name in names}
    assert not {name for name in own if f"`{name}`" not in documented}


def test_ids_of_clients_come_back(watched: Watched) -> None:
    theirs = {"x-ms-client-request-id": "b7b2c8c0-0000-1111-2222-333344445555"}
    answer = watched.get("/info", headers=ALICE | theirs)
    assert answer.headers["x-ms-client-request-id"] == theirs["x-ms-client-request-id"]
    answer = watched.get("/info", headers=ALICE | {"x-ms-client-request-id": "x" * 101})
    assert "x-ms-client-request-id" not in answer.headers


def test_the_loggers_name_is_documented() -> None:
    """Operators' filters name it, so that it is no detail of where the code stands."""
    documented = (Path(__file__).parents[4] / "docs" / "operate.md").read_text(encoding="utf-8")
    assert LOGGER == "serving.gateway.http.access_log"
    assert f"`{LOGGER}`" in documented
