"""Gradients of whole models."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import ModelConfig
from mixtral_jax.hf_config import from_hf
from mixtral_jax.model.adapter import Adapter, AdapterConfig, LowRank
from mixtral_jax.model.transformer import Transformer, named_parameters
from tests.support import sources
from tests.support.models import model_of

CONFIGS = {"dense": from_hf(sources.DENSE), "moe": from_hf(sources.MOE)}
TOKENS = jnp.asarray(np.random.default_rng(3).integers(0, sources.V, (4, 24), np.int32))


def adapter_of(config: ModelConfig) -> Adapter:
    """An adapter of rank 4 for all targets, whose B is not zero."""
    targets = ("q", "k", "v", "o", "gate", "up", "down") + (("router",) if config.is_moe else ())
    made = Adapter.random(config, AdapterConfig(targets=targets, rank=4), jax.random.key(0))
    return jax.tree.map(
        lambda low: LowRank(low.a, 0.05 * jax.random.normal(jax.random.key(1), low.b.shape)),
        made,
        is_leaf=lambda node: isinstance(node, LowRank),
    )


def loss(model: Transformer, adapter: Adapter | None, tokens: jax.Array) -> jax.Array:
    """The mean cross-entropy of each token behind the one before it."""
    logits = jax.nn.log_softmax(model(tokens, adapter)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1))


def flat(tree: object) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def strong_model(config: ModelConfig, dtype: str) -> Transformer:
    """Weights five times as large as new ones, so that every layer changes what comes in."""
    model = model_of(config, dtype)  # int8: the same weights, rounded
    for name, variable in named_parameters(model).items():
        value = variable.get_value()
        if name.endswith(".scale") or (value.ndim > 1 and value.dtype != jnp.int8):
            variable.set_value(5 * value)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_on_int8_learns_what_it_learns_on_floats(kind: str) -> None:
    config = CONFIGS[kind]
    adapter, gradients = adapter_of(config), []
    for dtype in ("float32", "int8"):
        model = strong_model(config, dtype)
        gradients.append(flat(jax.jit(jax.grad(partial(loss, model)))(adapter, TOKENS)))
    first, second = gradients
    cosine = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
    assert cosine >= 0.99
