"""Metrics of a gateway process, for Prometheus: requests, their times, and their tokens.

`python -m serving.gateway --metrics-port` serves them (serving/observe/metrics_port.py); without
that flag they are counted, but not served.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Bounds of the histograms in seconds: from milliseconds to the minutes of a full queue.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class GatewayMetrics:
    """Counts and times requests. Routes are those of the application: no client can add one."""

    def __init__(self) -> None:
        # A registry of its own keeps two gateways in one process apart, as in tests.
        self.registry = CollectorRegistry()
        # The figures of the whole gateway, which may be several processes.
        self.report: Callable[[], bytes] = self.text
        self._requests = Counter(
            "mixtral_gateway_requests",
            "Requests that have ended: whole, dropped (by the client), broken (by a failure), or "
            "refused before they could be read.",
            ["route", "status", "outcome"],
            registry=self.registry,
        )
        self._first_byte = Histogram(
            "mixtral_gateway_first_byte_seconds",
            "From a request's arrival to the first byte of its answer's body.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._whole = Histogram(
            "mixtral_gateway_request_seconds",
            "From a request's arrival to its end.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._tokens = Counter(
            "mixtral_gateway_tokens",
            "Tokens of prompts and completions, of answers that have ended.",
            ["kind"],
            registry=self.registry,
        )
        self.open_requests = Gauge(
            "mixtral_gateway_open_requests", "Requests under way.", registry=self.registry
        )
        self.open_streams = Gauge(
            "mixtral_gateway_open_streams", "Of them, streams.", registry=self.registry
        )
        self.open_connections = Gauge(
            "mixtral_gateway_open_connections", "Open connections.", registry=self.registry
        )
        self.refused_connections = Counter(
            "mixtral_gateway_refused_connections",
            "Connections closed unserved: over the limit of all (total) or of their address, "
            "without files to open (files), or with a failed handshake.",
            ["reason"],
            registry=self.registry,
        )
        self.ended_idle_connections = Counter(
            "mixtral_gateway_ended_idle_connections",
            "Idle connections that were closed to make room for new ones.",
            registry=self.registry,
        )
        self.dropped_trailers = Counter(
            "mixtral_gateway_dropped_trailers",
            "Trailer fields of requests, which are read and ignored.",
            registry=self.registry,
        )

    def text(self) -> bytes:
        """Returns the figures of this process in Prometheus' text format."""
        return generate_latest(self.registry)

    def ended(
        self, route: str, status: int, outcome: str, first_byte: float | None, seconds: float
    ) -> None:
        """Counts a request that has ended.

        Args:
            route: The route's path as the application wrote it.
            status: The HTTP status.
            outcome: "whole", "dropped", "broken" or "refused".
            first_byte: Seconds to the first byte of the answer's body; None if there was none.
            seconds: Seconds to the end.
        """
        self._requests.labels(route, str(status), outcome).inc()
        self._whole.labels(route).observe(seconds)
        if first_byte is not None:
            self._first_byte.labels(route).observe(first_byte)

    def tokens(self, prompt: int, completion: int) -> None:
        """Counts the tokens of an answer that has ended."""
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("completion").inc(completion)
