"""An adapter adds B(Ax) * scaling to its targets, and a packed row equals its documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.hf_config import from_hf
from mixtral_jax.model.adapter import Adapter, AdapterConfig, LowRank
from mixtral_jax.model.transformer import positions_in
from tests.support import sources
from tests.support.merged_models import merged_model
from tests.support.models import model_of

CONFIGS = {"dense": from_hf(sources.DENSE), "moe": from_hf(sources.MOE)}
DENSE_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
TOKENS = jnp.array([[1, 2, 3, 4, 5, 6, 7]])


def adapter_of(config: ModelConfig, adapter: AdapterConfig) -> Adapter:
    """An adapter whose B is not zero."""
    made = Adapter.random(config, adapter, jax.random.key(0))
    return jax.tree.map(
        lambda low: LowRank(low.a, 0.05 * jax.random.normal(jax.random.key(1), low.b.shape)),
        made,
        is_leaf=lambda node: isinstance(node, LowRank),
    )


@pytest.mark.parametrize("kind", ["moe", pytest.param("dense", marks=pytest.mark.soak)])
def test_an_adapter_equals_the_weights_that_it_stands_for(kind: str) -> None:
    config = CONFIGS[kind]
    targets = DENSE_TARGETS + (("router",) if config.is_moe else ())
    settings = AdapterConfig(targets=targets, rank=4, alpha=6.0)
    assert settings.scaling == 1.5
    adapter = adapter_of(config, settings)
    model, merged = model_of(config), merged_model(config, adapter, settings)
    with jax.default_matmul_precision("highest"):
        want = merged(TOKENS)
        got = model(TOKENS, adapter.folded(settings))
    assert jnp.abs(want - model(TOKENS)).max() > 1e-3
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_new_adapter_changes_nothing(kind: str) -> None:
    config = CONFIGS[kind]
    model, settings = model_of(config), AdapterConfig(rank=2)
    adapter = Adapter.random(config, settings, jax.random.key(0))
    np.testing.assert_array_equal(model(TOKENS, adapter.folded(settings)), model(TOKENS))


@pytest.mark.parametrize("kind", ["moe", pytest.param("dense", marks=pytest.mark.soak)])
def test_documents_of_a_packed_row_do_not_see_each_other(kind: str) -> None:
    model = model_of(CONFIGS[kind])
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2]])
    packed = model.hidden(TOKENS, segments=segments)
    first, second = model.hidden(TOKENS[:, :3]), model.hidden(TOKENS[:, 3:])
    np.testing.assert_allclose(packed[:, :3], first, rtol=0, atol=1e-6)
    np.testing.assert_allclose(packed[:, 3:], second, rtol=0, atol=1e-6)


def test_positions_begin_anew_with_each_segment() -> None:
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [3, 1, 1, 1, 1, 1]])
    want = [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    np.testing.assert_array_equal(positions_in(segments), want)


@pytest.mark.soak
def test_recomputed_layers_give_the_same_gradient() -> None:
    config, settings = CONFIGS["moe"], AdapterConfig(rank=2)
    model, adapter = model_of(config), adapter_of(CONFIGS["moe"], settings)

    def loss(adapter: Adapter, is_recomputed: bool) -> jax.Array:
        return jnp.sum(model.hidden(TOKENS, adapter=adapter, is_recomputed=is_recomputed)[0, -1])

    plain, again = (jax.grad(loss)(adapter, is_recomputed) for is_recomputed in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, again)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="'w1' is no target"):
        AdapterConfig(targets=("w1",))
    with pytest.raises(ConfigError, match="rank is 0"):
        AdapterConfig(rank=0)
    with pytest.raises(ConfigError, match="no router"):
        AdapterConfig(targets=("router",)).check(CONFIGS["dense"])
    assert AdapterConfig(rank=4, alpha=8.0, rank_stabilized=True).scaling == 4
