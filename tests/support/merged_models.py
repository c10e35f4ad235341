"""Models with an adapter added to their weights: what an engine with that adapter must equal."""

import math

import jax.numpy as jnp

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.adapter import Adapter, AdapterConfig
from mixtral_jax.model.transformer import Transformer, named_parameters
from tests.support.models import model_of


def merged_model(
    config: ModelConfig, adapter: Adapter, settings: AdapterConfig, seed: int = 0
) -> Transformer:
    """The model of `model_of(config, seed=seed)` with an adapter added to its weights."""
    merged = model_of(config, seed=seed)
    parameters = named_parameters(merged)
    for i, layer in enumerate(adapter.layers):
        for target, low in layer._asdict().items():
            if low is None:
                continue
            room = "attention" if target in ("q", "k", "v", "o") else "feed_forward"
            variable = parameters[f"layers.{i}.{room}.{target}.weight"]
            weight = variable.get_value()
            has_experts = config.is_moe and target in ("gate", "up", "down")
            lead = weight.shape[:1] if has_experts else ()
            outputs = math.prod(low.b.shape[len(lead) : -1])
            a = low.a.reshape(*lead, settings.rank, -1)
            delta = jnp.matmul(low.b.reshape(*lead, outputs, settings.rank), a)
            variable.set_value(weight + settings.scaling * delta.reshape(weight.shape))
    return merged
