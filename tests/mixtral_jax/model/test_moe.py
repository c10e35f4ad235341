"""Three forms of one sum."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels import kernels_for
from mixtral_jax.layout import Layout
from mixtral_jax.model.adapter_stack import AdaptedWeight
from mixtral_jax.model.moe import MoE, moe_dense, moe_exchanged, route
from mixtral_jax.placement import Placement
from mixtral_jax.sharding import ShardingRules, make_mesh
from mixtral_jax.weight import Weight


def moe_of(
    config: ModelConfig,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    dp_attention: bool = False,
) -> MoE:
    return MoE(config, Placement.of(config, dtype, mesh, dp_attention), nnx.Rngs(3))


def test_route_takes_the_two_likeliest_and_weighs_them_by_softmax() -> None:
    choice, weights = route(jnp.log(jnp.asarray([[1.0, 6.0, 0.5, 2.0]])), 2)
    assert choice.tolist() == [[1, 3]]
    np.testing.assert_allclose(weights, [[0.75, 0.25]], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_dense_equals_ragged_equals_paged(tokens: int, dtype: str) -> None:
    config = ModelConfig.tiny(vocab_size=8)
    layer = moe_of(config, dtype)
    layer.router.weight.set_value(layer.router.weight.get_value() * 50)  # uneven choices
    x = jax.random.normal(jax.random.key(tokens), (tokens, config.hidden_size))
    dense = layer.full(x, form="dense")
    assert jnp.abs(dense).max() > 1e-4
    np.testing.assert_allclose(layer.full(x, form="ragged"), dense, rtol=0, atol=1e-5)
    np.testing.assert_allclose(jax.jit(MoE.paged)(layer, x), dense, rtol=0, atol=1e-5)


def test_one_expert_of_one_is_its_feed_forward() -> None:
    """X = E = 1: the weight is 1 and the sum is the expert itself."""
    config = replace(ModelConfig.tiny(vocab_size=8), num_experts=1, experts_per_token=1)
    layer = moe_of(config)
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
        ((2, 2, 2), "fp8"),
    ],
)
def test_sharded_equals_dense(tokens: int, shape: tuple[int, int, int], dtype: str) -> None:
    """Token counts that the data axis divides and that it does not."""
    config = ModelConfig.tiny(vocab_size=8)
    mesh = make_mesh(*shape)
    one = moe_of(config, dtype)
    many = moe_of(config, dtype, mesh)
    x = jax.random.normal(jax.random.key(tokens), (tokens, config.hidden_size))
    sharded = jax.jit(lambda layer, x: layer.full(x))(many, x)
    np.testing.assert_allclose(sharded, one.full(x, form="dense"), rtol=0, atol=1e-5)


def skewed(tokens: int, config: ModelConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens of which most choose the first expert."""
    x = jax.random.normal(jax.random.key(tokens), (tokens, config.hidden_size))
    scores = jax.random.normal(jax.random.key(7), (tokens, config.num_experts))
    return x, *route(scores.at[: tokens * 3 // 4, 0].add(9.0), config.experts_per_token)


@pytest.mark.parametrize("shape", [(1, 4, 1), (2, 4, 1), (1, 2, 4)])
@pytest.mark.parametrize("tokens", [8, 48])
def test_exchanged_equals_dense(tokens: int, shape: tuple[int, int, int]) -> None:
    config = ModelConfig.tiny(vocab_size=8)
    layer = moe_of(config)
    x, choice, weights = skewed(tokens, config)
    mesh = make_mesh(*shape)
    layout = Layout(mesh, ShardingRules.of(config, mesh, dp_attention=True))
    rows = layout.rules.spec("BD")
    specs = [AdaptedWeight(Weight(layout.rules.spec(axes), None)) for axes in ("EFD", "EFD", "EDF")]
    spread = jax.shard_map(
        lambda x, choice, weights, *experts: moe_exchanged(
            x, choice, weights, experts, layout, kernels_for("cpu")
        ),
        mesh=mesh,
        in_specs=(rows, rows, rows, *specs),
        out_specs=rows,
        check_vma=False,
    )
    want = moe_dense(x, choice, weights, layer.experts)
    assert jnp.abs(want).max() > 1e-4
    got = jax.jit(spread)(x, choice, weights, *layer.experts)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_many_tokens_of_a_device_are_exchanged() -> None:
    """The full form under a mesh takes the exchange by itself, and nothing is different."""
    config = ModelConfig.tiny(vocab_size=8)
    mesh = make_mesh(1, 4, 2)
    one = moe_of(config)
    many = moe_of(config, mesh=mesh, dp_attention=True)
    x = jax.random.normal(jax.random.key(1), (4 * 64, config.hidden_size))
    spread = jax.jit(lambda layer, x: layer.full(x)).lower(many, x)
    assert "all_gather" in spread.as_text()  # the exchange, as CPU does it
    assert "reduce_scatter" not in spread.as_text()
    np.testing.assert_allclose(spread.compile()(many, x), one.full(x), rtol=0, atol=1e-5)
