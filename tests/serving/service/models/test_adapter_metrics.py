"""Figures of adapters: as many series as adapters are loaded."""

from pathlib import Path

from prometheus_client import CollectorRegistry

from serving.service.models.adapter_metrics import AdapterMetrics

ROOT = Path(__file__).parents[4]


def figures(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_requests_and_tokens_are_counted_by_adapter() -> None:
    registry, loaded = CollectorRegistry(), ["b", "a"]
    metrics = AdapterMetrics(registry, "toy", lambda: loaded)
    metrics.num_failed = lambda: 3
    metrics.answered("a", 5, 7)
    metrics.answered("a", 5, 1)
    metrics.failed()
    assert figures(registry) == {
        ("mixtral_adapter_load_failures_total",): 1,
        ("mixtral_adapters",): 2,
        ("mixtral_failed_adapters",): 3,
        ("mixtral_adapter_requests_total", "toy", "a"): 2,
        ("mixtral_adapter_requests_total", "toy", "b"): 0,
        ("mixtral_adapter_prompt_tokens_total", "toy", "a"): 10,
        ("mixtral_adapter_prompt_tokens_total", "toy", "b"): 0,
        ("mixtral_adapter_generation_tokens_total", "toy", "a"): 8,
        ("mixtral_adapter_generation_tokens_total", "toy", "b"): 0,
    }


def test_every_metric_is_documented() -> None:
    registry = CollectorRegistry()
    AdapterMetrics(registry, "toy", lambda: ["a"])
    documented = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
    names = {key[0] for key in figures(registry)}
    assert len(names) == 6
    assert not {name for name in names if f"`{name}`" not in documented}


def test_the_figures_of_an_adapter_end_with_it() -> None:
    registry, loaded = CollectorRegistry(), ["a"]
    metrics = AdapterMetrics(registry, "toy", lambda: loaded)
    for number in range(100):
        loaded[:] = [f"a{number}"]
        metrics.answered(f"a{number}", 1, 1)
        names = [key[2] for key in figures(registry) if key[0] == "mixtral_adapter_requests_total"]
        assert names == loaded
    loaded.clear()
    metrics.answered("a7", 1, 1)  # a request that was under way as its adapter went
    figures(registry)
    assert metrics._figures == {}


def test_figures_that_nobody_reads_are_no_more_than_adapters() -> None:
    loaded = list[str]()
    metrics = AdapterMetrics(CollectorRegistry(), "toy", lambda: loaded)
    for number in range(100):
        loaded[:] = [f"a{number}"]
        metrics.answered(f"a{number}", 1, 1)
    assert list(metrics._figures) == ["a99"]
