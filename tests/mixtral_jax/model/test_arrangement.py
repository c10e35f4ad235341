"""An arranged model computes the same, and has the shapes of an abstract one."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.checkpoint.folder import Card
from mixtral_jax.checkpoint.restore import load
from mixtral_jax.checkpoint.writer import save
from mixtral_jax.config import ModelConfig
from mixtral_jax.generation import generate_tokens, steps_for
from mixtral_jax.kernels.cpu import build
from mixtral_jax.model.arrangement import arrange
from mixtral_jax.model.transformer import Transformer, named_parameters
from mixtral_jax.sharding import make_mesh
from tests.support.models import model_of

pytestmark = pytest.mark.skipif(
    not build.available(), reason="no C++ compiler: weights stay as they are on this machine"
)
MOE = replace(ModelConfig.tiny(vocab_size=32), head_size=32, num_layers=1)
DENSE = replace(MOE, num_experts=0, experts_per_token=0)


@pytest.mark.parametrize("config", [MOE, DENSE], ids=["moe", "dense"])
def test_an_arranged_model_computes_the_same(config: ModelConfig) -> None:
    model = model_of(config, "int4")
    tokens = jnp.asarray([[1, 5, 7, 3]])
    want = model(tokens)
    arrange(model)
    values = {name: variable.get_value() for name, variable in named_parameters(model).items()}
    words = {name for name, value in values.items() if value.dtype == jnp.uint32}
    assert len(words) == 7, "q, k, v, o, gate, up and down"
    np.testing.assert_array_equal(model(tokens), want)
    arrange(model)
    np.testing.assert_array_equal(model(tokens), want)
    abstract = Transformer(config, model.placement, rngs=None)
    arrange(abstract)
    for name, variable in named_parameters(abstract).items():
        shape, value = variable.get_value(), values[name]
        assert (shape.shape, shape.dtype) == (value.shape, value.dtype), name


def test_under_a_mesh_weights_whose_inputs_are_split_stay_as_they_are() -> None:
    """Tensor parallelism splits the inputs of o and down."""
    config = replace(DENSE, feed_forward_size=128)
    model = model_of(config, "int4", mesh=make_mesh(tensor=2))
    drawn = greedy(model_of(config, "int4"))
    arrange(model)
    words = {
        name.split(".", 2)[2].removesuffix(".weight")
        for name, variable in named_parameters(model).items()
        if variable.get_value().dtype == jnp.uint32
    }
    attention = {f"attention.{name}" for name in "qkv"}
    assert words == attention | {"feed_forward.gate", "feed_forward.up"}
    assert greedy(model) == drawn


def greedy(model: Transformer) -> list[int]:
    return [*generate_tokens(model, [1, 5, 7, 3], temperature=0.0, max_tokens=8)]


@pytest.mark.parametrize("dtype", ["int4", pytest.param("int8", marks=pytest.mark.soak)])
def test_a_model_that_has_drawn_is_saved_as_it_was(dtype: str, tmp_path: Path) -> None:
    """That of int8 has weights of int8x16 beside."""
    beside = (("layers.0.attention.o", "int8x16"), ("layers.0.feed_forward.up", "int8x16"))
    model = model_of(MOE, dtype, weight_dtypes=beside)
    named = {name: np.array(v.get_value()) for name, v in named_parameters(model).items()}
    greedy(model)
    arranged = {v.get_value().dtype for v in named_parameters(model).values()}
    assert jnp.dtype(jnp.int32) in arranged
    card = Card(model=MOE, dtype=dtype, name="toy", provider="", weight_dtypes=beside)
    save(tmp_path / "toy", model, card, ())
    loaded, _ = load(tmp_path / "toy")
    for name, variable in named_parameters(loaded).items():
        np.testing.assert_array_equal(variable.get_value(), named[name])


def test_a_model_compiles_once_though_its_weights_are_arranged_meanwhile() -> None:
    model = model_of(DENSE, "int4")
    greedy(model)
    first = steps_for(model, 12)
    greedy(model)
    assert steps_for(model, 12) is first
