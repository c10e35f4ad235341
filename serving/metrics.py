"""What an engine process tells Prometheus: figures of its scheduler, its tokens and their times.

`python -m serving --metrics-port` serves them on 127.0.0.1; without it they are counted all the
same, and nobody reads them.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.scheduler import Scheduler

# Seconds. A first token takes from milliseconds to the minutes of a full queue.
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_NEXT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counts and times tokens; `watch` adds what the engine knows itself."""

    def __init__(self) -> None:
        # Its own registry: a second engine in one process, as in tests, is no second series.
        self.registry = CollectorRegistry()
        self._generated = Counter(
            "mixtral_generated_tokens", "Tokens generated.", registry=self.registry
        )
        self._first = Histogram(
            "mixtral_time_to_first_token_seconds",
            "From a request's arrival to the first token of each of its choices.",
            buckets=_FIRST,
            registry=self.registry,
        )
        self._next = Histogram(
            "mixtral_inter_token_seconds",
            "Between two tokens of one choice.",
            buckets=_NEXT,
            registry=self.registry,
        )

    def first_token(self, seconds: float) -> None:
        """A choice had its first token, so long after its request came."""
        self._generated.inc()
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """A choice had another token, so long after the one before."""
        self._generated.inc()
        self._next.observe(seconds)

    def watch(self, scheduler: Scheduler, compilations: Callable[[], int]) -> None:
        """From now on the figures of an engine are among them; to be called once, when it is ready.

        They are read from another thread than the engine's, one by one: each is right, but two of
        them may be of two moments.
        """
        self.registry.register(_EngineFigures(scheduler, compilations))

    def serve(self, port: int) -> int:
        """Serves them at http://127.0.0.1:PORT/metrics from a thread; returns the port.

        Port 0 chooses one. Raises OSError if it is taken.
        """
        server, _ = start_http_server(port, addr="127.0.0.1", registry=self.registry)
        return int(server.server_port)


class _EngineFigures(Collector):
    def __init__(self, scheduler: Scheduler, compilations: Callable[[], int]) -> None:
        self._scheduler = scheduler
        self._compilations = compilations

    def collect(self) -> Iterator[Metric]:
        scheduler = self._scheduler
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        yield gauge("mixtral_running_sequences", "Choices being computed.", scheduler.num_running)
        yield gauge("mixtral_waiting_sequences", "Choices in the queue.", scheduler.num_waiting)
        yield gauge("mixtral_pages", "For keys and values.", scheduler.limits.num_pages)
        yield gauge("mixtral_free_pages", "Held by no request.", scheduler.num_free_pages)
        yield gauge(
            "mixtral_cached_pages",
            "Of the free ones, kept for requests that begin alike.",
            scheduler.num_cached_pages,
        )
        yield counter(
            "mixtral_preemptions",
            "Sequences put back into the queue for want of pages.",
            scheduler.preemptions,
        )
        yield counter("mixtral_prompt_tokens", "Tokens of prompts.", scheduler.prompt_tokens)
        yield counter(
            "mixtral_prefix_hit_tokens", "Of these, found cached.", scheduler.prefix_hit_tokens
        )
        yield counter(
            "mixtral_compilations",
            "Programs compiled since the engine was ready: 0, or something is wrong.",
            self._compilations(),
        )
