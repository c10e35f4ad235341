"""Metrics of adapters for Prometheus: what is loaded, and what each has answered.

The figures of an adapter end with it, so that there are never more series than adapters loaded:
any number of names may come and go while a server runs.
"""

import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_LABELS = ("model_name", "adapter")


@dataclass
class _Figures:
    """Sums of the requests that an adapter has answered since it was loaded."""

    requests: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


class AdapterMetrics(Collector):
    """Counts requests and tokens by adapter. Thread-safe.

    Args:
        registry: That of the process.
        model_name: The served name of the model.
        loaded: Returns the names of the loaded adapters.

    Attributes:
        num_failed: Returns the number of adapters in the watched folder that cannot be loaded.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        model_name: str,
        loaded: Callable[[], Collection[str]],
    ) -> None:
        self._model_name = model_name
        self._loaded = loaded
        self.num_failed: Callable[[], int] = lambda: 0
        self._lock = threading.Lock()
        self._figures: dict[str, _Figures] = {}
        self._failures = Counter(
            "mixtral_adapter_load_failures",
            "Adapters of the watched folder that could not be loaded, each time.",
            registry=registry,
        )
        registry.register(self)

    def failed(self) -> None:
        """Counts an adapter that could not be loaded."""
        self._failures.inc()

    def answered(self, adapter: str, prompt_tokens: int, generation_tokens: int) -> None:
        """Counts a request that is over.

        Args:
            adapter: Who was to answer it.
            prompt_tokens: Tokens of its prompt, if it had a token at all.
            generation_tokens: Tokens of all its choices.
        """
        loaded = self._loaded()
        with self._lock:
            self._keep(loaded)  # where nobody reads the metrics, too
            if adapter not in self._figures:
                return  # it has gone meanwhile
            figures = self._figures[adapter]
            figures.requests += 1
            figures.prompt_tokens += prompt_tokens
            figures.generation_tokens += generation_tokens

    def _keep(self, loaded: Collection[str]) -> None:
        """Forgets the figures of all others."""
        self._figures = {name: self._figures.get(name) or _Figures() for name in loaded}

    def collect(self) -> Iterator[Metric]:
        """Yields the figures of the adapters that are loaded, and forgets those of all others."""
        loaded = sorted(self._loaded())
        with self._lock:
            self._keep(loaded)
            figures = [(name, vars(self._figures[name]).copy()) for name in loaded]
        yield GaugeMetricFamily("mixtral_adapters", "Adapters that are loaded.", len(loaded))
        yield GaugeMetricFamily(
            "mixtral_failed_adapters",
            "Adapters of the watched folder that cannot be loaded as they are now.",
            self.num_failed(),
        )
        for key, what in [
            ("requests", "Requests for an adapter that are over."),
            ("prompt_tokens", "Tokens of their prompts."),
            ("generation_tokens", "Tokens that it has generated."),
        ]:
            family = CounterMetricFamily(f"mixtral_adapter_{key}", what, labels=_LABELS)
            for name, counts in figures:
                family.add_metric([self._model_name, name], counts[key])
            yield family
