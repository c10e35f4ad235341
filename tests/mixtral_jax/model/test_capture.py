"""A capture records what it is asked for, changes nothing, and works within jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import ModelConfig
from mixtral_jax.hf_config import from_hf
from mixtral_jax.model.capture import NOTHING, Capture
from mixtral_jax.model.layers import Rotary
from mixtral_jax.model.transformer import Block
from tests.support import sources
from tests.support.models import model_of

B, T, X = 2, 7, 2
ALL = {
    "attention.qkv",
    "attention.o",
    "feed_forward.in",
    "feed_forward.down",
    "feed_forward.sizes",
    "router.choice",
    "router.weights",
}
CONFIGS = {"dense": from_hf(sources.DENSE), "moe": from_hf(sources.MOE)}


def run(config: ModelConfig, *names: str) -> tuple[Block, jax.Array, jax.Array, Capture]:
    """A block, its input and output, and a capture of these names."""
    block = model_of(config).layers[0]
    x = jax.random.normal(jax.random.key(0), (B, T, config.hidden_size))
    rotary = Rotary.at(jnp.arange(T)[None, :], config)
    capture = Capture(names)
    return block, x, block.full(x, rotary, capture), capture


@pytest.mark.parametrize("kind", CONFIGS)
def test_recording_changes_nothing_and_keeps_what_is_asked_for(kind: str) -> None:
    config = CONFIGS[kind]
    block, x, out, capture = run(config, *ALL)
    rotary = Rotary.at(jnp.arange(T)[None, :], config)
    np.testing.assert_array_equal(out, block.full(x, rotary))
    assert not NOTHING.values
    dense = ALL - {"feed_forward.sizes", "router.choice", "router.weights"}
    assert capture.values.keys() == (ALL if kind == "moe" else dense)
    _, _, _, one = run(config, "attention.o", "an unknown name")
    assert one.values.keys() == {"attention.o"}
    assert one.values["attention.o"].shape == (B, T, sources.N, sources.H)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_block_can_be_put_together_from_what_was_recorded(kind: str) -> None:
    block, x, out, capture = run(CONFIGS[kind], *ALL)
    values = capture.values
    np.testing.assert_array_equal(values["attention.qkv"], block.attention_norm.full(x))
    middle = x + block.attention.o.full(values["attention.o"])
    normed = block.feed_forward_norm.full(middle)
    np.testing.assert_allclose(values["feed_forward.in"], normed, rtol=1e-5, atol=1e-6)
    if kind == "dense":
        rest = block.feed_forward.down.full(values["feed_forward.down"])
    else:
        # Rows are sorted by expert; ties keep the order of their tokens.
        choice = np.asarray(values["router.choice"]).reshape(-1)
        weights = np.asarray(values["router.weights"]).reshape(-1)
        order = np.argsort(choice, kind="stable")
        np.testing.assert_array_equal(values["feed_forward.sizes"], np.bincount(choice))
        np.testing.assert_allclose(weights.reshape(-1, X).sum(axis=1), 1, rtol=1e-6)
        down = np.asarray(block.feed_forward.down.weight[...])
        flat = np.zeros((B * T, sources.D), np.float32)
        for row, pair in zip(np.asarray(values["feed_forward.down"]), order, strict=True):
            flat[pair // X] += weights[pair] * (down[choice[pair]] @ row)
        rest = flat.reshape(B, T, -1)
    np.testing.assert_allclose(out, middle + rest, rtol=1e-4, atol=1e-5)


def test_within_jit_values_are_returned() -> None:
    config = CONFIGS["moe"]
    block, x, out, _ = run(config)
    rotary = Rotary.at(jnp.arange(T)[None, :], config)

    @jax.jit
    def traced(block: Block, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        capture = Capture({"router.weights"})
        return block.full(x, rotary, capture), capture.values

    found, values = traced(block, x)
    np.testing.assert_allclose(found, out, rtol=1e-5, atol=1e-6)
    assert values["router.weights"].shape == (B * T, X)
