"""Gradients of whole models."""

import math
import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.config import ModelConfig
from mixtral_jax.hf_config import from_hf
from mixtral_jax.model.adapter import Adapter, AdapterConfig, LowRank
from mixtral_jax.model.capture import Capture
from mixtral_jax.model.transformer import Transformer, named_parameters
from mixtral_jax.sharding import make_mesh
from mixtral_jax.training.batch import Batch
from mixtral_jax.training.example import Example
from mixtral_jax.training.step.router_losses import RouterSums
from tests.support import parity, sources
from tests.support.models import model_of, split_over

CONFIGS = {"dense": from_hf(sources.DENSE), "moe": from_hf(sources.MOE)}
TOKENS = jnp.asarray(np.random.default_rng(3).integers(0, sources.V, (4, 24), np.int32))


def adapter_of(config: ModelConfig) -> Adapter:
    """An adapter of rank 4 for all targets, whose B is not zero."""
    targets = ("q", "k", "v", "o", "gate", "up", "down") + (("router",) if config.is_moe else ())
    made = Adapter.random(config, AdapterConfig(targets=targets, rank=4), jax.random.key(0))
    return jax.tree.map(
        lambda low: LowRank(low.a, 0.05 * jax.random.normal(jax.random.key(1), low.b.shape)),
        made,
        is_leaf=lambda node: isinstance(node, LowRank),
    )


def loss(model: Transformer, adapter: Adapter | None, tokens: jax.Array) -> jax.Array:
    """The mean cross-entropy of each token behind the one before it."""
    logits = jax.nn.log_softmax(model(tokens, adapter)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1))


def flat(tree: object) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def strong_model(config: ModelConfig, dtype: str) -> Transformer:
    """Weights five times as large as new ones, so that every layer changes what comes in."""
    model = model_of(config, dtype)  # int8: the same weights, rounded
    for name, variable in named_parameters(model).items():
        value = variable.get_value()
        if name.endswith(".scale") or (value.ndim > 1 and value.dtype != jnp.int8):
            variable.set_value(5 * value)
    return model


@pytest.mark.parametrize("kind", ["moe", pytest.param("dense", marks=pytest.mark.soak)])
def test_an_adapter_on_int8_learns_what_it_learns_on_floats(kind: str) -> None:
    config = CONFIGS[kind]
    adapter, gradients = adapter_of(config), []
    for dtype in ("float32", "int8"):
        model = strong_model(config, dtype)
        gradients.append(flat(jax.jit(jax.grad(partial(loss, model)))(adapter, TOKENS)))
    first, second = gradients
    cosine = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
    assert cosine >= 0.99


AUX = 0.7  # the coefficient of the router's loss: large, so that its gradient shows


@pytest.mark.slow  # torch, and a gradient of every parameter
@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_gradients_of_all_parameters_equal_transformers(kind: str) -> None:
    """Mistral with a window of 5, Mixtral with 3 experts and the router's loss."""
    settings = parity.MODELS[kind]()
    settings.router_aux_loss_coef = AUX
    theirs = parity.random_huggingface(settings)
    import torch

    ids = jnp.asarray(
        np.random.default_rng(7).integers(0, parity.SHAPE["vocab_size"], (2, 40), np.int32)
    )
    given = torch.from_numpy(np.array(ids)).long()
    router = {"output_router_logits": True} if kind == "mixtral" else {}
    wanted = theirs(given, labels=given, use_cache=False, **router).loss
    wanted.backward()
    model = parity.twin(theirs)
    graph, state = nnx.split(model)

    def their_loss(state: nnx.State) -> jax.Array:
        model = nnx.merge(graph, state)
        captures = [Capture({"router.logits", "router.choice"}) for _ in model.layers]
        logits = jax.nn.log_softmax(model.logits(model.hidden(ids, captures=captures))[:, :-1])
        likely = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)
        if kind == "mistral":
            return -jnp.mean(likely)
        sums = RouterSums.of(captures, jnp.ones(ids.shape, bool))
        return AUX * sums.aux(sums.picks, jnp.asarray(float(ids.size))) - jnp.mean(likely)

    got, gradients = jax.jit(jax.value_and_grad(their_loss))(state)
    np.testing.assert_allclose(got, wanted.item(), rtol=1e-5)
    slopes = {name: weight.grad.numpy() for name, weight in theirs.named_parameters()}
    want = named_parameters(parity.twin_of(slopes, theirs.config.to_dict()))
    ours = named_parameters(nnx.merge(graph, gradients))
    assert ours.keys() == want.keys()
    for name, variable in want.items():
        expected = variable.get_value()
        error = jnp.linalg.norm(jnp.ravel(ours[name].get_value() - expected))
        assert error <= 1e-4 * jnp.linalg.norm(jnp.ravel(expected)), name


@pytest.mark.parametrize("kind", ["moe", pytest.param("dense", marks=pytest.mark.soak)])
def test_packed_documents_teach_what_padded_ones_teach(kind: str) -> None:
    """Three documents in one row against a row each, with a window of 5."""
    config = CONFIGS[kind]
    assert config.sliding_window == 5
    documents = [Example(tuple(range(1, n)), (0.0, 0.0, *[1.0] * (n - 3))) for n in (13, 9, 11)]
    graph, state = nnx.split(strong_model(config, "float32"))

    def total(state: nnx.State, batch: Batch) -> jax.Array:
        model = nnx.merge(graph, state)
        hidden = model.hidden(batch.tokens, segments=batch.segments)
        logits = jax.nn.log_softmax(model.logits(hidden))
        likely = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(likely * batch.weights)

    step = jax.jit(jax.value_and_grad(total))
    packed, packed_slopes = step(state, Batch.packed([documents], 36))
    padded, padded_slopes = step(state, Batch.packed([[x] for x in documents], 16))
    np.testing.assert_allclose(packed, padded, rtol=1e-6)
    first, second = flat(packed_slopes), flat(padded_slopes)
    assert np.linalg.norm(first - second) <= 1e-6 * np.linalg.norm(second)


def product_shapes(step: Any, *given: Any) -> set[tuple[int, ...]]:
    """Sizes, sorted, of what the products of a compiled program give."""
    text = jax.jit(step).lower(*given).compile().as_text()
    results = re.findall(r"= f32\[([\d,]+)\]\S* (?:dot|custom-call)\(", text)
    return {tuple(sorted(map(int, sizes.split(",")))) for sizes in results}


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_no_weight_of_the_base_has_a_gradient_in_an_adapters_program(kind: str, dtype: str) -> None:
    """Sizes of rows (100), of the rank (4) and of weights differ, so shapes tell them apart."""
    config = replace(CONFIGS[kind], num_layers=1)
    graph, state = nnx.split(model_of(config, dtype))
    tokens = jnp.zeros((4, 25), jnp.int32)
    weights = {tuple(sorted(x.shape)) for x in jax.tree.leaves(state) if x.ndim > 1}
    width = config.hidden_size
    weights |= {tuple(sorted((math.prod(shape) // width, width))) for shape in weights}

    def both(adapter: Adapter, state: nnx.State) -> jax.Array:
        return loss(nnx.merge(graph, state), adapter, tokens)

    of_adapter = product_shapes(jax.grad(both), adapter_of(config), state)
    assert (4, width) in of_adapter
    assert not of_adapter & weights
    if dtype == "float32":
        assert product_shapes(jax.grad(both, argnums=1), adapter_of(config), state) & weights


@pytest.mark.slow  # eight devices
@pytest.mark.parametrize(
    ("kind", "mesh", "dp_attention"),
    [
        ("dense", dict(data=2, tensor=2), False),
        pytest.param("moe", dict(data=2, expert=3), False, marks=pytest.mark.soak),
        ("moe", dict(expert=3), True),  # tokens travel to their experts and back
    ],
)
def test_one_device_and_a_mesh_give_one_gradient(
    kind: str, mesh: dict[str, int], dp_attention: bool
) -> None:
    """Of an adapter, and of all parameters."""
    config = CONFIGS[kind]
    alone, adapter = strong_model(config, "float32"), adapter_of(config)
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, sources.V, (6, 40), np.int32))
    split = split_over(alone, make_mesh(**mesh), dp_attention)
    gradients = []
    for model in (alone, split):
        graph, state = nnx.split(model)

        def both(adapter: Adapter, state: nnx.State, graph: Any = graph) -> jax.Array:
            return loss(nnx.merge(graph, state), adapter, tokens)

        gradients.append(jax.jit(jax.grad(both, argnums=(0, 1)))(adapter, state))
    for first, second in zip(*gradients, strict=True):
        want = flat(first)
        assert np.linalg.norm(flat(second) - want) <= 1e-6 * np.linalg.norm(want)
