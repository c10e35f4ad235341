"""Rules by hand, and the whole model under meshes of eight virtual devices."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError, TopologyError
from mixtral_jax.placement import Placement
from mixtral_jax.sharding import ShardingRules, copies_of, make_mesh, mesh_for, mesh_text
from tests.support.models import model_of, split_over

RULES = ShardingRules()
# Eight heads in four groups, so that a mesh of eight must copy key/value heads.
MOE = replace(
    ModelConfig.tiny(vocab_size=32), num_heads=8, num_kv_heads=4, head_size=8, num_experts=8
)
DENSE = replace(MOE, num_experts=0, experts_per_token=0)
MESHES = [(1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2), (8, 1, 1)]


def test_specs() -> None:
    assert RULES.spec("EFD") == P("expert", ("tensor", "copy"), None)
    assert RULES.spec("NHD") == P(("expert", "tensor", "copy"), None, None)
    assert RULES.spec("BTD") == P("data", None, None)


def test_one_mesh_axis_is_never_used_twice() -> None:
    with pytest.raises(ValueError, match="'NF' would split two dimensions"):
        RULES.spec("NF")


def test_what_does_not_divide_is_refused() -> None:
    three = replace(MOE, num_experts=3)
    mesh = make_mesh(expert=2)
    with pytest.raises(ConfigError, match="3 experts cannot be split 2 ways"):
        Placement.of(three, "float32", mesh)
    with pytest.raises(ConfigError, match="8 experts cannot be split 3 ways"):
        Placement.of(MOE, "float32", make_mesh(expert=3))
    with pytest.raises(ValueError, match="needs 9 devices, there are 8"):
        make_mesh(expert=9)
    with pytest.raises(ValueError, match="tensor=2 cannot hold 4 copies"):
        make_mesh(tensor=2, copies=4)


@pytest.mark.parametrize("name", ["data", "expert", "tensor", "copies"])
@pytest.mark.parametrize("size", [0, -1])
def test_sizes_of_a_mesh_are_1_or_more(name: str, size: int) -> None:
    with pytest.raises(TopologyError, match=f"a mesh of {name}={size}: sizes are whole numbers"):
        make_mesh(**{name: size})
    with pytest.raises(TopologyError, match="needs 1 devices, there are 0"):
        make_mesh(devices=[])


def test_copies_of_key_value_heads() -> None:
    """Four key/value heads: eight devices hold each twice, four or two hold each once."""
    assert copies_of(MOE, 1, 8) == copies_of(MOE, 4, 2) == 2
    assert copies_of(MOE, 1, 4) == copies_of(MOE, 2, 2) == copies_of(MOE, 8, 1) == 1
    assert copies_of(MOE, 4, 2, dp_attention=True) == 1


def mesh_of(config: ModelConfig, shape: tuple[int, int, int]) -> jax.sharding.Mesh:
    return make_mesh(*shape, copies=copies_of(config, *shape[1:]))


@pytest.mark.parametrize(
    ("config", "shape", "dp_attention"),
    [
        pytest.param(config, shape, dp_attention, id=f"{name}-{shape}-{form}", marks=marks)
        for name, config in (("moe", MOE), ("dense", DENSE))
        for shape in MESHES
        for marks in [() if shape == (2, 2, 2) else pytest.mark.soak]
        for form, dp_attention in (("heads", False), ("sequences", True))
        if not dp_attention or shape[1] > 1  # sequences are split over `expert`
    ],
)
def test_full_form_under_a_mesh_equals_one_device(
    config: ModelConfig, shape: tuple[int, int, int], dp_attention: bool
) -> None:
    one = model_of(config, seed=1)
    tokens = jax.random.randint(jax.random.key(0), (8, 20), 0, 32)
    want = jax.jit(lambda model, tokens: model(tokens))(one, tokens)
    assert jnp.abs(want).max() > 1e-3

    mesh = mesh_of(config, shape)
    rules = ShardingRules.of(config, mesh, dp_attention)
    many = split_over(one, mesh, dp_attention)
    if config.is_moe:
        held = many.layers[0].feed_forward.gate.weight.get_value().addressable_shards[0]
        assert held.data.shape == (8 // shape[1], 96 // shape[2], 64)
    rows = jax.device_put(tokens, rules.sharding("BT", mesh))
    got = jax.jit(lambda model, tokens: model(tokens))(many, rows)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_a_mesh_by_its_text() -> None:
    assert mesh_text(mesh_for(MOE, "expert=4, tensor=2")) == "data=1,expert=4,tensor=2"
    assert mesh_for(MOE, "tensor=8").shape["copy"] == 2
    with pytest.raises(ConfigError, match="expert is there twice"):
        mesh_for(MOE, "expert=4,expert=2")
    with pytest.raises(ConfigError, match="'exprt=4' is not one of data, expert, tensor"):
        mesh_for(MOE, "exprt=4")
    with pytest.raises(ConfigError, match="needs 16 devices, there are 8"):
        mesh_for(MOE, "expert=8,tensor=2")


def test_auto_takes_all_devices_experts_first() -> None:
    assert mesh_text(mesh_for(MOE)) == "data=1,expert=8,tensor=1"
    assert mesh_text(mesh_for(DENSE)) == "data=1,expert=1,tensor=8"
    assert mesh_text(mesh_for(replace(MOE, num_experts=4))) == "data=1,expert=4,tensor=2"
    three = replace(DENSE, num_heads=3, num_kv_heads=3, vocab_size=33)
    assert mesh_text(mesh_for(three)) == "data=8,expert=1,tensor=1"
    assert mesh_for(DENSE, devices=jax.devices()[:1]) is None


def test_a_vocabulary_that_does_not_divide_is_copied() -> None:
    odd = replace(MOE, vocab_size=34)
    assert ShardingRules.of(odd, make_mesh(1, 4, 2)).V == ("tensor", "copy")
    assert ShardingRules.of(replace(MOE, vocab_size=33), make_mesh(1, 4, 2)).V == ()
