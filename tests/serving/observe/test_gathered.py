"""The figures of processes are added up, and their counts outlive them."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serving.observe.gathered import GatheredFigures


class Process:
    """The figures of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("requests", "Ended.", ["status"], registry=self.registry)
        self.seconds = Histogram("seconds", "Time.", buckets=(1, 10), registry=self.registry)
        self.open = Gauge("open", "Under way.", registry=self.registry)
        self.failed = Gauge("keys_reload_failed", "1 or 0.", registry=self.registry)

    @property
    def text(self) -> str:
        return generate_latest(self.registry).decode()


def values(figures: GatheredFigures) -> dict[str, float]:
    return {
        sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(figures.text().decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_sums_have_the_form_of_one_process() -> None:
    process, figures = Process(), GatheredFigures()
    process.requests.labels("200").inc(3)
    process.seconds.observe(5)
    figures.put(1, process.text)
    assert figures.text().decode() == process.text


def test_counts_are_added_and_outlive_their_process() -> None:
    one, two, figures = Process(), Process(), GatheredFigures()
    one.requests.labels("200").inc(3)
    two.requests.labels("200").inc(4)
    two.requests.labels("429").inc()
    for process, seconds in ((one, 0.5), (two, 5)):
        process.seconds.observe(seconds)
        process.open.set(2)
    two.failed.set(1)
    figures.put(1, one.text)
    figures.put(2, two.text)
    counts = {"requests_total 200": 7, "requests_total 429": 1, "seconds_sum": 5.5}
    counts |= {"seconds_count": 2, "seconds_bucket 1.0": 1, "seconds_bucket 10.0": 2}
    counts |= {"seconds_bucket +Inf": 2}
    assert values(figures) == counts | {"open": 4, "keys_reload_failed": 1}
    figures.end(2)
    assert values(figures) == counts | {"open": 2, "keys_reload_failed": 0}
    figures.end(1)
    assert values(figures) == counts
    one.requests.labels("200").inc()  # it is said again, by another process
    figures.put(3, one.text)
    assert values(figures)["requests_total 200"] == 11


def test_a_process_that_has_said_nothing_leaves_nothing() -> None:
    figures = GatheredFigures()
    figures.end(1)
    assert figures.text() == b""
