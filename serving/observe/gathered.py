"""The figures of several processes of one server, added up.

Each process says its own in Prometheus' text format, every second. The counts of a process that has
ended stay in the sums, as far as it had said them, so that no counter goes back.
"""

import threading
from collections.abc import Hashable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

# The families that only grow; the others are of the moment.
_COUNTS = frozenset({"counter", "histogram", "summary"})
# Samples with these endings are not added up: the first time holds, and the worst state.
_FIRST, _WORST = "_created", "_failed"


class GatheredFigures(Collector):
    """Adds up the figures of processes. For any thread.

    Attributes:
        registry: Holds the sums, as those of one process.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._texts: dict[Hashable, str] = {}
        self._ended: list[Metric] = []
        self.registry.register(self)

    def put(self, process: Hashable, text: str) -> None:
        """Notes the figures of a process in place of those that it said before."""
        with self._lock:
            self._texts[process] = text

    def end(self, process: Hashable) -> None:
        """Keeps the counts of a process that has ended, and drops the rest of its figures."""
        with self._lock:
            text = self._texts.pop(process, "")
            counts = [family for family in _families(text) if family.type in _COUNTS]
            self._ended = list(_summed([*self._ended, *counts]))

    def collect(self) -> Iterator[Metric]:
        """Yields the sums; called by the registry."""
        with self._lock:
            texts, families = list(self._texts.values()), list(self._ended)
        for text in texts:
            families += _families(text)
        yield from _summed(families)

    def text(self) -> bytes:
        """Returns the sums in Prometheus' text format."""
        return generate_latest(self.registry)


def _families(text: str) -> list[Metric]:
    return list(text_string_to_metric_families(text))


def _summed(families: list[Metric]) -> Iterator[Metric]:
    """Yields a family for each name, whose samples are the sums of those of the same labels."""
    by_name: dict[str, Metric] = {}
    sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for family in families:
        by_name.setdefault(family.name, family)
        values = sums.setdefault(family.name, {})
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            before = values.get(key)
            values[key] = sample.value if before is None else _sum(sample, before)
    for name, family in by_name.items():
        whole = Metric(name, family.documentation, family.type, family.unit)
        for (sample_name, labels), value in sums[name].items():
            whole.add_sample(sample_name, dict(labels), value)
        yield whole


def _sum(sample: Sample, before: float) -> float:
    if sample.name.endswith(_FIRST):
        return min(sample.value, before)
    if sample.name.endswith(_WORST):
        return max(sample.value, before)
    return float(sample.value + before)
