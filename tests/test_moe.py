"""Three forms of one sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.config import ModelConfig
from mixtral_jax.moe import MoE, route
from mixtral_jax.sharding import Layout, ShardingRules, make_mesh


def test_route_takes_the_two_likeliest_and_weighs_them_by_softmax() -> None:
    choice, weights = route(jnp.log(jnp.asarray([[1.0, 6.0, 0.5, 2.0]])), 2)
    assert choice.tolist() == [[1, 3]]
    np.testing.assert_allclose(weights, [[0.75, 0.25]], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_dense_equals_ragged_equals_paged(tokens: int, dtype: str) -> None:
    config = ModelConfig.tiny(vocab_size=8)
    layer = MoE(config, dtype, jnp.float32, nnx.Rngs(3), None)
    layer.router.weight.set_value(layer.router.weight.get_value() * 50)  # uneven choices
    x = jax.random.normal(jax.random.key(tokens), (tokens, config.hidden_size))
    dense = layer.full(x, form="dense")
    assert jnp.abs(dense).max() > 1e-4
    np.testing.assert_allclose(layer.full(x, form="ragged"), dense, rtol=0, atol=1e-5)
    np.testing.assert_allclose(jax.jit(MoE.paged)(layer, x), dense, rtol=0, atol=1e-5)


def test_one_expert_of_one_is_its_feed_forward() -> None:
    """X = E = 1: the weight is 1 and the sum is the expert itself."""
    config = ModelConfig._with(ModelConfig.tiny(vocab_size=8), num_experts=1, experts_per_token=1)
    layer = MoE(config, jnp.float32, jnp.float32, nnx.Rngs(0), None)
    x = jax.random.normal(jax.random.key(0), (5, config.hidden_size))
    gate, up, down = (part.weight[...][0] for part in (layer.gate, layer.up, layer.down))
    want = (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T
    np.testing.assert_allclose(layer.full(x), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 6, 32])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 4, 1), "float32"),
        ((1, 4, 2), "float32"),
        ((2, 2, 2), "float32"),
        ((8, 1, 1), "float32"),
        # Not with experts cut in two: each part of a row is then rounded with its own scale.
        ((1, 4, 1), "int8"),
    ],
)
def test_sharded_equals_dense(tokens: int, shape: tuple[int, int, int], dtype: str) -> None:
    """Token counts that the data axis divides and that it does not."""
    config = ModelConfig.tiny(vocab_size=8)
    mesh = make_mesh(*shape)
    one = MoE(config, dtype, jnp.float32, nnx.Rngs(3), None)
    many = MoE(
        config, dtype, jnp.float32, nnx.Rngs(3), Layout(mesh, ShardingRules.of(config, mesh))
    )
    x = jax.random.normal(jax.random.key(tokens), (tokens, config.hidden_size))
    sharded = jax.jit(lambda layer, x: layer.full(x))(many, x)
    np.testing.assert_allclose(sharded, one.full(x, form="dense"), rtol=0, atol=1e-5)
