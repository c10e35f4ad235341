"""Expert load: how many tokens the steps of an engine have routed to each expert of each layer.

It is counted on the devices, with `--expert-metrics` alone, and read with the draws of each step.
"""

from collections.abc import Iterator

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from mixtral_jax.config import ModelConfig


class ExpertLoad(Collector):
    """Sums of the tokens by layer and expert: written by the engine's thread, read by any.

    A model of L layers and E experts has L * E series, one for each pair from the start.

    Args:
        config: of a mixture.
        registry: of the process; None where nothing is shown.
    """

    def __init__(self, config: ModelConfig, registry: CollectorRegistry | None = None) -> None:
        assert config.is_moe, "the model has no experts"
        # Replaced, never changed: another thread reads it.
        self._tokens = np.zeros((config.num_layers, config.num_experts), np.int64)
        if registry is not None:
            registry.register(self)

    @property
    def tokens(self) -> np.ndarray:
        """The sums [L E] i64; a token that has X experts is counted for each of them."""
        return self._tokens

    def add(self, tokens: np.ndarray) -> None:
        """Adds the counts of a step [L E]."""
        self._tokens = self._tokens + tokens

    def collect(self) -> Iterator[Metric]:
        """Yields the sums by `layer` and `expert`, both counted from 0."""
        family = CounterMetricFamily(
            "mixtral_expert_tokens",
            "Tokens that were routed to an expert of a layer, without padding.",
            labels=("layer", "expert"),
        )
        for layer, sums in enumerate(self._tokens):
            for expert, tokens in enumerate(sums):
                family.add_metric([str(layer), str(expert)], int(tokens))
        yield family
