"""Rules by hand, and the whole model under meshes of eight virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mixtral_jax.config import ConfigError, ModelConfig
from mixtral_jax.model import Transformer
from mixtral_jax.sharding import ShardingRules, make_mesh

RULES = ShardingRules()


def test_specs() -> None:
    assert RULES.spec("EFD") == P("expert", "tensor", None)
    assert RULES.spec("NHD") == P("tensor", None, None)
    assert RULES.spec("BTD") == P("data", None, None)


def test_one_mesh_axis_is_never_used_twice() -> None:
    with pytest.raises(ValueError, match="'NF' would split two dimensions"):
        RULES.spec("NF")


def test_what_does_not_divide_is_refused() -> None:
    config = ModelConfig._with(ModelConfig.tiny(vocab_size=8), num_experts=3, experts_per_token=2)
    with pytest.raises(ConfigError, match="axis E of size 3 cannot be split 2 ways"):
        RULES.check(config, make_mesh(expert=2))
    with pytest.raises(ValueError, match="needs 9 devices, there are 8"):
        make_mesh(expert=9)


def shard(model: Transformer, mesh: jax.sharding.Mesh) -> Transformer:
    """The same values, laid out over a mesh as the rules say."""
    target = Transformer(model.config, rngs=None, mesh=mesh)
    graph, abstract = nnx.split(target)
    values = dict(nnx.to_flat_state(nnx.state(model)))
    placed = [
        (
            path,
            variable.replace(
                jax.device_put(
                    values[path].get_value(),
                    RULES.sharding(variable.get_metadata("axes"), mesh),
                )
            ),
        )
        for path, variable in nnx.to_flat_state(abstract)
    ]
    return nnx.merge(graph, nnx.from_flat_state(placed))


@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 4, 2), (2, 2, 2), (8, 1, 1), (1, 1, 2)])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_full_form_under_a_mesh_equals_one_device(shape: tuple[int, int, int], kind: str) -> None:
    dense = dict(num_experts=0, experts_per_token=0) if kind == "dense" else {}
    config = ModelConfig._with(ModelConfig.tiny(vocab_size=32), **dense)
    one = Transformer(config, rngs=nnx.Rngs(1))
    tokens = jax.random.randint(jax.random.key(0), (8, 20), 0, 32)
    want = jax.jit(lambda model, tokens: model(tokens))(one, tokens)
    assert jnp.abs(want).max() > 1e-3

    mesh = make_mesh(*shape)
    many = shard(one, mesh)
    if kind == "moe":
        held = many.layers[0].feed_forward.gate.weight.get_value().addressable_shards[0]
        assert held.data.shape == (4 // shape[1], 96 // shape[2], 64)
    rows = jax.device_put(tokens, RULES.sharding("BT", mesh))
    got = jax.jit(lambda model, tokens: model(tokens))(many, rows)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
