"""A capture over the whole model: right values, and the plain call as it was."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import ArrayLike

from mixtral_jax.config import ModelConfig
from mixtral_jax.hf_config import from_hf
from mixtral_jax.model.inside import Inside
from tests.support import sources
from tests.support.models import model_of

CONFIGS = {"dense": from_hf(sources.DENSE), "moe": from_hf(sources.MOE)}
TOKENS = jnp.array([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])


@pytest.mark.parametrize("kind", CONFIGS)
def test_capturing_changes_no_logits(kind: str) -> None:
    model = model_of(CONFIGS[kind])
    logits, inside = model(TOKENS, capture=("hidden", "attention"))
    np.testing.assert_array_equal(logits, model(TOKENS))
    config = model.config
    assert inside.hidden is not None
    assert inside.hidden.shape == (config.num_layers + 1, 2, 5, config.hidden_size)
    np.testing.assert_array_equal(inside.hidden[0], model.embed.full(TOKENS))
    np.testing.assert_allclose(
        model.logits(model.norm.full(inside.hidden[-1])), logits, rtol=0, atol=1e-6
    )
    assert inside.choice is None
    assert list(inside.attention) == list(range(config.num_layers))


def test_attention_of_a_layer_is_the_one_that_it_computed() -> None:
    config = CONFIGS["moe"]
    model = model_of(config)
    _, inside = model(TOKENS, capture=("attention.1", "hidden"))
    (weights,) = inside.attention.values()
    assert weights.shape == (2, config.num_heads, 5, 5)
    np.testing.assert_allclose(jnp.sum(weights, axis=-1), 1, rtol=1e-6)
    assert jnp.all(jnp.triu(weights[0, 0], 1) == 0)
    assert inside.hidden is not None
    attention = model.layers[1].attention
    x = model.layers[1].attention_norm.full(inside.hidden[1])
    values = jnp.repeat(attention.v.full(x), config.num_heads // config.num_kv_heads, axis=2)
    mixed = attention.o.full(jnp.einsum("BNTS,BSNH->BTNH", weights, values))
    middle = inside.hidden[1] + mixed
    moe = model.layers[1].feed_forward.full(model.layers[1].feed_forward_norm.full(middle))
    np.testing.assert_allclose(middle + moe, inside.hidden[2], rtol=0, atol=1e-6)


def test_a_window_hides_old_keys() -> None:
    config = replace(ModelConfig.tiny(vocab_size=8), sliding_window=2)
    _, inside = model_of(config)(TOKENS, capture=("attention.0",))
    seen = inside.attention[0][0, 0] > 0
    np.testing.assert_array_equal(seen, np.tri(5, dtype=bool) & ~np.tri(5, k=-2, dtype=bool))


def test_load_and_entropy_of_a_hand_made_routing() -> None:
    """Two tokens of one layer with three experts: the first chose 0 and 1, the second 0 and 2."""
    probabilities = jnp.array([[[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]]])
    choice = jnp.array([[[[0, 1], [0, 2]]]])
    inside = Inside(choice, jnp.full((1, 1, 2, 2), 0.5), probabilities, None, {})
    np.testing.assert_allclose(inside.expert_load(), [[1.0, 0.5, 0.5]])
    np.testing.assert_allclose(inside.entropy(), [np.log(2) / 2], rtol=1e-6)
    first = jnp.array([[True, False]])
    np.testing.assert_allclose(inside.expert_load(first), [[1, 1, 0]])
    np.testing.assert_allclose(inside.entropy(first), [np.log(2)], rtol=1e-6)


@pytest.mark.parametrize("counted", [jnp.array([2]), np.array([True, False]), jnp.array([[True]])])
def test_counted_tokens_of_another_shape(counted: ArrayLike) -> None:
    probabilities, choice = jnp.ones((1, 1, 2, 3)) / 3, jnp.zeros((1, 1, 2, 1), int)
    inside = Inside(choice, jnp.ones((1, 1, 2, 1)), probabilities, None, {})
    with pytest.raises(ValueError, match=r"for each of the tokens \[1, 2\]"):
        inside.expert_load(counted)


def test_padding_on_the_right_changes_nothing_that_is_counted() -> None:
    model = model_of(CONFIGS["moe"])
    names = ("routing", "hidden", "attention.1")
    _, both = model(jnp.array([[1, 2, 3, 0, 0], [5, 4, 3, 2, 1]]), capture=names)
    _, short = model(jnp.array([[1, 2, 3]]), capture=names)
    _, long = model(jnp.array([[5, 4, 3, 2, 1]]), capture=names)
    np.testing.assert_array_equal(both.choice[:, :1, :3], short.choice)
    np.testing.assert_allclose(both.hidden[:, :1, :3], short.hidden, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        both.attention[1][:1, :, :3, :3], short.attention[1], rtol=0, atol=1e-6
    )
    counted = jnp.array([[True, True, True, False, False], [True] * 5])
    for name in ("expert_load", "entropy"):
        expected = (3 * getattr(short, name)() + 5 * getattr(long, name)()) / 8
        np.testing.assert_allclose(getattr(both, name)(counted), expected, rtol=1e-5)


def test_it_prints_its_shapes() -> None:
    _, inside = model_of(CONFIGS["dense"])(TOKENS, capture=("attention.1",))
    assert repr(inside) == f"Inside(attention[1] [2, {CONFIGS['dense'].num_heads}, 5, 5])"


def test_routing_is_that_of_every_layer() -> None:
    config = CONFIGS["moe"]
    model = model_of(config)
    run = jax.jit(lambda model, tokens: model(tokens, capture=("routing",)))
    _, inside = run(model, TOKENS)
    assert inside.choice.shape == (config.num_layers, 2, 5, config.experts_per_token)
    np.testing.assert_allclose(jnp.sum(inside.weights, axis=-1), 1, rtol=1e-6)
    likeliest = jnp.argmax(inside.probabilities, axis=-1)
    np.testing.assert_array_equal(inside.choice[..., 0], likeliest)
    np.testing.assert_allclose(jnp.sum(inside.expert_load(), axis=1), config.experts_per_token)


@pytest.mark.parametrize(
    ("kind", "names", "message"),
    [
        ("dense", ("routing",), "has no experts"),
        ("moe", ("gates",), "does not know 'gates'"),
        ("moe", "attention.99", "there is no layer 99"),
        ("moe", ("attention.-1",), "does not know"),
    ],
)
def test_names_that_it_does_not_know(kind: str, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(CONFIGS[kind])(TOKENS, capture=names)


def test_load_without_routing_says_what_to_give() -> None:
    with pytest.raises(ValueError, match="capture="):
        Inside(None, None, None, None, {}).expert_load()
