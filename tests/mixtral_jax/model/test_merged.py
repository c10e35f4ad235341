"""A merged model computes what the model and its adapter do, and shares what is not changed."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mixtral_jax
from mixtral_jax.errors import AdapterError
from mixtral_jax.hf_config import from_hf
from mixtral_jax.model.adapter import AdapterConfig, placed
from mixtral_jax.model.merged import merge
from mixtral_jax.model.transformer import Transformer, named_parameters
from mixtral_jax.placement import Placement
from mixtral_jax.sharding import make_mesh
from tests.support import sources
from tests.support.adapters import ALL, random_adapter
from tests.support.models import model_of, split_over

MOE = from_hf(sources.MOE)
SETTINGS = AdapterConfig(targets=ALL, rank=4, alpha=6.0)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, sources.V, (2, 5)))


@pytest.mark.slow
def test_merged_equals_beside() -> None:
    model = model_of(MOE)
    adapter = random_adapter(MOE, SETTINGS).folded(SETTINGS)
    with jax.default_matmul_precision("highest"):
        want = model(TOKENS, adapter)
        merged = merge(model, adapter)
        np.testing.assert_allclose(merged(TOKENS), want, rtol=0, atol=2e-5)
    before, after = named_parameters(model), named_parameters(merged)
    for name in ("embed.weight", "layers.1.attention_norm.weight", "head.weight"):
        assert after[name].get_value() is before[name].get_value()
    assert (after["layers.1.attention.q.weight"].get_value() != 0).all()
    changed = after["layers.1.feed_forward.up.weight"].get_value()
    assert (changed != before["layers.1.feed_forward.up.weight"].get_value()).all()


def test_a_model_over_devices_stays_split() -> None:
    model = model_of(MOE)
    adapter = random_adapter(MOE, SETTINGS).folded(SETTINGS)
    split = split_over(model, make_mesh(expert=3))
    merged = merge(split, placed(adapter, MOE, split.placement.layout))
    whole = named_parameters(merge(model, adapter))
    for name, variable in named_parameters(merged).items():
        array = variable.get_value()
        assert array.sharding == named_parameters(split)[name].get_value().sharding
        np.testing.assert_allclose(array, whole[name].get_value(), rtol=0, atol=1e-6)


def test_bfloat16_is_rounded_once() -> None:
    model = model_of(MOE, dtype="bfloat16")
    adapter = random_adapter(MOE, SETTINGS, size=0.02).folded(SETTINGS)
    merged = named_parameters(merge(model, adapter))["layers.0.attention.v.weight"].get_value()
    before = named_parameters(model)["layers.0.attention.v.weight"].get_value()
    low = adapter.layers[0].v
    delta = np.einsum("KHU,UD->KHD", low.b, low.a)
    want = (before.astype(jnp.float32) + delta).astype(jnp.bfloat16)
    assert merged.dtype == jnp.bfloat16
    assert (merged == want).mean() > 0.99


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_rounded_weights_are_refused(dtype: str) -> None:
    model = Transformer(MOE, Placement.of(MOE, dtype, mesh=None), rngs=None)
    with pytest.raises(AdapterError, match="beside the model"):
        merge(model, random_adapter(MOE, SETTINGS).folded(SETTINGS))


@pytest.mark.slow
def test_a_notebook_answers_with_and_without_an_adapter(tmp_path: Path) -> None:
    model, tokenizer = mixtral_jax.load("tiny-random", mesh=None)
    settings = AdapterConfig(targets=("v", "o", "router", "down"), rank=2, alpha=4.0)
    made = random_adapter(model.config, settings, size=0.5).folded(settings)
    mixtral_jax.save_adapter(made, tmp_path / "adapter", base="tiny-random")
    adapter = mixtral_jax.load_adapter(tmp_path / "adapter", model)
    for ours, theirs in zip(jax.tree.leaves(adapter), jax.tree.leaves(made), strict=True):
        assert isinstance(ours, jax.Array)
        np.testing.assert_array_equal(ours, theirs)
    tuned = mixtral_jax.merge(model, adapter)
    answers = [
        "".join(mixtral_jax.generate(each, tokenizer, "Once", max_tokens=5, temperature=0.0))
        for each in (model, tuned, model)
    ]
    assert answers[0] == answers[2] != answers[1]
