"""Spans as the SDK's own exporter receives them, and how a trace is handed on."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from serving.observe.tracing import CLIENT, Traces

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traces(exporter: InMemorySpanExporter) -> Iterator[Traces]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    traces = Traces(provider)
    yield traces
    traces.close()


def test_a_trace_goes_on(traces: Traces, exporter: InMemorySpanExporter) -> None:
    span = traces.begin("outer", {"traceparent": PARENT, "tracestate": "a=b"}, {"x": 1})
    assert span.is_recording
    child = span.child("inner", {"y": ["z"]}, kind=CLIENT, start=100.0)
    carrier = dict(child.carrier())
    child.end(at=100.5)
    span.rename("request")
    span.fail("Broken")
    span.end()
    inner, outer = exporter.get_finished_spans()
    assert outer.name == "request" and outer.parent is not None and outer.context is not None
    assert f"{outer.context.trace_id:032x}" == TRACE
    assert f"{outer.parent.span_id:016x}" == SPAN
    assert dict(outer.attributes or {}) == {"x": 1, "error.type": "Broken"}
    assert outer.kind.name == "SERVER" and outer.status.status_code.name == "ERROR"
    assert inner.parent is not None and inner.parent.span_id == outer.context.span_id
    assert inner.kind.name == "CLIENT" and dict(inner.attributes or {}) == {"y": ("z",)}
    assert (inner.start_time, inner.end_time) == (100_000_000_000, 100_500_000_000)
    assert inner.context is not None
    assert carrier == {
        "traceparent": f"00-{TRACE}-{inner.context.span_id:016x}-01",
        "tracestate": "a=b",
    }


def test_a_stranger_s_trace_is_linked_to(exporter: InMemorySpanExporter) -> None:
    """Nobody else decides about sampling: a trace of our own begins, and goes on from there."""
    provider = TracerProvider(sampler=ALWAYS_ON, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    traces = Traces(provider, trusts_parents=False)
    span = traces.begin("x", {"traceparent": PARENT[:-1] + "0", "tracestate": "a=b"})
    carrier = dict(span.carrier())
    span.end()
    traces.begin("y", {}).end()
    linked, alone = exporter.get_finished_spans()
    assert linked.parent is None and linked.context is not None
    assert f"{linked.context.trace_id:032x}" != TRACE
    (link,) = linked.links
    assert f"{link.context.trace_id:032x}-{link.context.span_id:016x}" == f"{TRACE}-{SPAN}"
    assert list(carrier) == ["traceparent"] and TRACE not in carrier["traceparent"]
    assert not alone.links
    traces.close()


def test_off_it_passes_no_stranger_s_trace_on() -> None:
    assert Traces(trusts_parents=False).begin("x", {"traceparent": PARENT}).carrier() == []


def test_without_a_parent_a_trace_begins(traces: Traces, exporter: InMemorySpanExporter) -> None:
    for header in ({}, {"traceparent": "00-none-of-this-01"}, {"traceparent": "00-" + "0" * 60}):
        traces.begin("x", header).end()
    spans = exporter.get_finished_spans()
    assert all(span.parent is None for span in spans)
    assert len({span.context.trace_id for span in spans if span.context}) == 3


def test_what_the_client_does_not_want_sampled_is_not(
    traces: Traces, exporter: InMemorySpanExporter
) -> None:
    span = traces.begin("x", {"traceparent": PARENT[:-1] + "0"})
    assert not span.is_recording
    assert dict(span.carrier())["traceparent"].endswith("-00")
    span.end()
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize(
    ("headers", "passed_on"),
    [
        ({}, {}),
        ({"traceparent": PARENT, "other": "x"}, {"traceparent": PARENT}),
        (
            {"traceparent": PARENT, "tracestate": "a=b"},
            {"traceparent": PARENT, "tracestate": "a=b"},
        ),
        ({"traceparent": PARENT, "tracestate": "ä"}, {"traceparent": PARENT}),
        ({"traceparent": PARENT + "\n"}, {}),
        ({"tracestate": "a=b"}, {}),
    ],
)
def test_off_it_passes_on_what_is_well_formed(
    headers: dict[str, str], passed_on: dict[str, str]
) -> None:
    span = Traces().begin("x", headers)
    assert not span.is_recording
    child = span.child("y")
    child.set({"a": 1})
    child.fail("x")
    child.rename("z")
    child.end()
    assert dict(child.carrier()) == passed_on


def test_it_is_off_without_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    assert not Traces.exported(None, "test").begin("x", {}).is_recording


def test_an_endpoint_that_is_none() -> None:
    with pytest.raises(ValueError, match="'127.0.0.1:4318'; give a URL such as http://"):
        Traces.exported("127.0.0.1:4318", "test")


def test_without_the_extra() -> None:
    """As in an installation that lacks it: the flag says what is missing, the variable nothing."""
    code = (
        "import os, sys\n"
        "sys.modules['opentelemetry.sdk'] = None\n"
        "from serving.observe.tracing import Traces\n"
        "os.environ['OTEL_EXPORTER_OTLP_ENDPOINT'] = 'http://127.0.0.1:9'\n"
        "print(Traces.exported(None, 'test').begin('x', {}).is_recording)\n"
        "try: Traces.exported('http://127.0.0.1:9', 'test')\n"
        "except ValueError as error: print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == [
        "False",
        "--otlp-endpoint needs OpenTelemetry: pip install 'mixtral-jax[otel]'",
    ]
