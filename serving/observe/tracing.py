"""Traces of requests, by OpenTelemetry; without a collector they cost next to nothing.

A trace that a trusted client began continues through the gateway and the service. The W3C's
`traceparent` carries it as an HTTP header and as gRPC metadata. If tracing is off it is passed on
unchanged, so that the next process can continue it. Spans hold no text of prompts or answers.

The packages come with the extra `otel`. A thread sends spans by OTLP over HTTP, in batches. The
OTEL_* environment variables work as in any program: sampling, headers, resource.
"""

import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from serving.errors import SetupError

if TYPE_CHECKING:  # they may not be installed
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

Attributes = Mapping[str, str | int | float | bool | Sequence[str]]

SERVER, CLIENT, INTERNAL = "SERVER", "CLIENT", "INTERNAL"

_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_STATE = re.compile(r"[\x21-\x7e]{1,512}")
_SECONDS = 5.0  # time that sending a batch may take, and sending the rest at the end


class Span:
    """A span of OpenTelemetry; without tracing it does nothing."""

    def __init__(
        self,
        carrier: Mapping[str, str],
        tracer: "trace.Tracer | None" = None,
        span: "trace.Span | None" = None,
    ) -> None:
        self._carrier = carrier  # headers that the request came with
        self._tracer = tracer
        self._span = span

    @property
    def is_recording(self) -> bool:
        """True if the span will be sent; otherwise costly attributes may be left out."""
        return self._span is not None and self._span.is_recording()

    def child(
        self,
        name: str,
        attributes: Attributes | None = None,
        *,
        kind: str = INTERNAL,
        start: float | None = None,
    ) -> "Span":
        """Begins a span inside this one, at `start` (time.time(); by default now)."""
        if self._tracer is None or self._span is None:
            return self
        from opentelemetry import trace

        span = self._tracer.start_span(
            name,
            trace.set_span_in_context(self._span),
            trace.SpanKind[kind],
            dict(attributes or {}),
            start_time=_nanoseconds(start),
        )
        return Span(self._carrier, self._tracer, span)

    def rename(self, name: str) -> None:
        """Changes the name."""
        if self._span is not None:
            self._span.update_name(name)

    def set(self, attributes: Attributes) -> None:
        """Adds attributes, or changes them."""
        if self._span is not None:
            self._span.set_attributes(dict(attributes))

    def fail(self, kind: str) -> None:
        """Marks the span as failed, with the name of an error."""
        if self._span is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_attribute("error.type", kind)
            self._span.set_status(StatusCode.ERROR, kind)

    def end(self, at: float | None = None) -> None:
        """Ends the span at `at` (time.time(); by default now)."""
        if self._span is not None:
            self._span.end(_nanoseconds(at))

    def carrier(self) -> list[tuple[str, str]]:
        """Returns the headers, or metadata, by which the next process continues the trace."""
        if self._span is None:
            return [*_passed_on(self._carrier).items()]
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers: dict[str, str] = {}
        context = trace.set_span_in_context(self._span)
        TraceContextTextMapPropagator().inject(headers, context)
        return [*headers.items()]


class Traces:
    """Begins spans. Without a provider they do nothing.

    Args:
        provider: OpenTelemetry's, which sends the spans.
        trusts_parents: Whether a span continues the trace that a request came with, and is sampled
            as that says. Otherwise it begins a trace, which has a link to the other.
    """

    def __init__(
        self, provider: "TracerProvider | None" = None, *, trusts_parents: bool = True
    ) -> None:
        self._provider = provider
        self._trusts_parents = trusts_parents
        self._tracer = provider.get_tracer("mixtral-jax") if provider else None

    @classmethod
    def exported(
        cls, endpoint: str | None, process: str, *, trusts_parents: bool = True
    ) -> "Traces":
        """Returns traces that are sent to `endpoint`, such as http://127.0.0.1:4318.

        Without an endpoint that of the environment is taken, if there is one and the extra is
        installed; otherwise tracing is off.

        Raises SetupError if an endpoint is given without the extra, or is no URL.
        """
        if endpoint is None and not any(os.environ.get(name) for name in _VARIABLES):
            return cls(trusts_parents=trusts_parents)
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            if endpoint is None:
                return cls(trusts_parents=trusts_parents)
            raise SetupError(
                "--otlp-endpoint needs OpenTelemetry: pip install 'mixtral-jax[otel]'"
            ) from None
        if endpoint is not None and not re.match(r"https?://[^/]", endpoint):
            raise SetupError(
                f"--otlp-endpoint is {endpoint!r}; give a URL such as http://127.0.0.1:4318"
            )
        name = os.environ.get("OTEL_SERVICE_NAME") or f"mixtral-jax-{process}"
        provider = TracerProvider(
            resource=Resource.create({"service.name": name}), shutdown_on_exit=False
        )
        url = None if endpoint is None else f"{endpoint.rstrip('/')}/v1/traces"
        exporter = OTLPSpanExporter(endpoint=url, timeout=_SECONDS)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider, trusts_parents=trusts_parents)

    def begin(
        self,
        name: str,
        carrier: Mapping[str, str],
        attributes: Attributes | None = None,
        *,
        kind: str = SERVER,
    ) -> Span:
        """Begins a span, inside the one that `carrier` names, if it names one that is trusted.

        `carrier` holds headers or metadata with names in lower case.
        """
        if self._tracer is None:
            return Span(carrier if self._trusts_parents else {})
        from opentelemetry import trace
        from opentelemetry.context import Context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(_passed_on(carrier), Context())
        links = []
        if not self._trusts_parents:
            context = trace.get_current_span(parent).get_span_context()
            links = [trace.Link(context)] if context.is_valid else []
            parent, carrier = Context(), {}
        span = self._tracer.start_span(
            name, parent, trace.SpanKind[kind], dict(attributes or {}), links
        )
        return Span(carrier, self._tracer, span)

    def close(self) -> None:
        """Sends the spans that are not sent yet; waits for the collector a short time."""
        if self._provider is not None:
            closing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
            closing.start()
            closing.join(_SECONDS)


def _passed_on(carrier: Mapping[str, str]) -> dict[str, str]:
    """Returns the headers that carry a trace, if they are well-formed, as gRPC demands."""
    parent, state = carrier.get("traceparent", ""), carrier.get("tracestate", "")
    if not _PARENT.fullmatch(parent):
        return {}
    return {"traceparent": parent} | ({"tracestate": state} if _STATE.fullmatch(state) else {})


def _nanoseconds(at: float | None) -> int:
    return time.time_ns() if at is None else int(at * 1e9)
