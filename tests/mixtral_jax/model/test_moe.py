"""Three forms of one sum."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels import Kernels, kernels_for
from mixtral_jax.kernels.gpu.triton import products as gpu
from mixtral_jax.kernels.tpu import products as tpu
from mixtral_jax.layout import Layout
from mixtral_jax.model.adapter_stack import AdaptedWeight
from mixtral_jax.model.moe import (
    MoE,
    moe_dense,
    moe_exchanged,
    moe_local,
    route,
    without_padding,
)
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


# As an accelerator has them: up to 10 tokens of 8 experts are sorted, 11 to 128 are not.
FEW = replace(kernels_for("xla"), max_dense_tokens=128)
EIGHT = replace(ModelConfig.tiny(vocab_size=8), num_experts=8)


def local_sum(
    shape: tuple[int, int, int], dp_attention: bool, kernels: Kernels, tokens: int, used: int
) -> tuple[np.ndarray, np.ndarray]:
    """`moe_local` of steps of which `used` places hold a token on each device, and the oracle's."""
    layer, mesh = moe_of(EIGHT), make_mesh(*shape)
    layout = Layout(mesh, ShardingRules.of(EIGHT, mesh, dp_attention))
    groups = layout.num_sequence_groups
    x, choice, weights = skewed(groups * tokens, EIGHT)
    rows = layout.rules.spec("BD")
    specs = [AdaptedWeight(Weight(layout.rules.spec(axes), None)) for axes in ("EFD", "EFD", "EDF")]

    def local(
        x: jax.Array, choice: jax.Array, weights: jax.Array, *experts: AdaptedWeight
    ) -> jax.Array:
        choice = without_padding(choice, jnp.asarray(used, jnp.int32), EIGHT.num_experts)
        return moe_local(x, choice, weights, (experts[0], experts[1], experts[2]), layout, kernels)

    spread = jax.shard_map(
        local, mesh=mesh, in_specs=(rows, rows, rows, *specs), out_specs=rows, check_vma=False
    )
    got = jax.jit(spread)(x, choice, weights, *layer.experts)
    want = np.array(moe_dense(x, choice, weights, layer.experts))
    want.reshape(groups, tokens, -1)[:, used:] = 0
    return np.asarray(got), want


@pytest.mark.parametrize(
    ("shape", "dp_attention"), [((1, 8, 1), False), ((1, 1, 8), False), ((1, 4, 2), True)]
)
@pytest.mark.parametrize(
    ("tokens", "used"),
    [
        (8, 3),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((1, 1), (16, 9), (64, 0))),
    ],
)
def test_padding_adds_nothing_on_any_path(
    shape: tuple[int, int, int], dp_attention: bool, tokens: int, used: int
) -> None:
    """Sorted, dense and, for 64 tokens of sequences that are split, exchanged: rows of zeros."""
    got, want = local_sum(shape, dp_attention, FEW, tokens, used)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert (np.abs(want).max() > 1e-4) == (used > 0)


def test_a_step_reads_no_expert_for_its_padding() -> None:
    """A bucket of eight places with one token: the groups of the product have two rows in all."""
    layer = moe_of(EIGHT)
    x = jax.random.normal(jax.random.key(0), (8, EIGHT.hidden_size))
    (want,) = route(layer.router.full(x[:1]), 2)[0].tolist()
    seen: list[list[int]] = []

    def grouped(x: jax.Array, sizes: jax.Array, weight: Weight) -> jax.Array:
        seen.append(sizes.tolist())
        return kernels_for("xla").grouped(x, sizes, weight)

    layer.kernels = replace(FEW, grouped=grouped)
    layer.paged(x, num_tokens=jnp.asarray(1, jnp.int32))
    assert seen == 3 * [[int(expert in want) for expert in range(8)]]


def interpreted_tpu(x: jax.Array, sizes: jax.Array, weight: Weight) -> jax.Array:
    return tpu.grouped(x, sizes, weight, interpret=True)


def interpreted_gpu(x: jax.Array, sizes: jax.Array, weight: Weight) -> jax.Array:
    return gpu.grouped(x, sizes, weight, interpret=True)


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [interpreted_tpu, interpreted_gpu])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(("places", "used"), [(1, 1), (8, 5)])
def test_an_accelerators_step_is_the_oracles(
    grouped: Callable[..., jax.Array], dtype: str, places: int, used: int
) -> None:
    """Experts of whole tiles, interpreted, against every expert on every token."""
    config = replace(EIGHT, hidden_size=128, feed_forward_size=256)
    layer = moe_of(config, dtype)
    layer.kernels = replace(FEW, grouped=grouped)
    x = jax.random.normal(jax.random.key(places), (places, config.hidden_size))
    got = jax.jit(MoE.paged)(layer, x, num_tokens=jnp.asarray(used, jnp.int32))
    want = layer.full(x, form="dense")
    np.testing.assert_allclose(got[:used], want[:used], rtol=0, atol=1e-5)
    assert not np.any(got[used:])
