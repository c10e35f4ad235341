"""The engine under meshes of eight virtual devices gives what it gives on one."""

import functools
import random
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mixtral_jax.config import ModelConfig
from mixtral_jax.generation import generate_draws
from mixtral_jax.model.transformer import Transformer, named_parameters
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.sharding import ShardingRules, copies_of, make_mesh
from mixtral_jax.weight import Weight
from serving.engine.build import compile_steps, engine_of
from serving.scheduling.request import Drawn, Request
from serving.scheduling.step_plan import Limits
from tests.support.models import model_of, split_over

VOCAB = 64
# Eight heads in four groups, so that a mesh of eight must copy key/value heads.
MOE = replace(
    ModelConfig.tiny(vocab_size=VOCAB),
    num_heads=8,
    num_kv_heads=4,
    head_size=8,
    num_experts=8,
    sliding_window=None,
    max_context=96,
)
DENSE = replace(MOE, num_experts=0, experts_per_token=0)
MESHES = [(1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2), (8, 1, 1)]
# Those that CI has time for: what is split, copied and gathered is among them.
OFTEN = [("moe", (2, 2, 2)), ("moe", (1, 1, 8))]
EACH = [
    pytest.param(config, shape, dp_attention, id=f"{name}-{shape}-{form}", marks=marks)
    for name, config in (("moe", MOE), ("dense", DENSE))
    for shape in MESHES
    for marks in [() if (name, shape) in OFTEN else pytest.mark.soak]
    for form, dp_attention in (("heads", False), ("sequences", True))
    if not dp_attention or shape[1] > 1  # sequences are split over `expert`
]
# Of those of rounded weights, likewise: int4 and int8, in layers of two forms.
ROUNDED = [("mixed", "moe", (2, 2, 2))]
# No router stands behind the last down, whose parts of rows have scales of their own: a token on
# the edge between two experts would choose the other one.
MIXED = (
    ("layers.0.attention.o", "int8x16"),
    ("layers.0.attention.v", "int8"),
    ("layers.0.feed_forward.up", "int8x16"),
    ("layers.1.feed_forward.down", "int8"),
)
LIMITS = Limits(
    num_pages=60,
    page_size=4,
    max_sequences=4,
    max_step_tokens=24,
    max_context=96,
    max_waiting=999,
)


def large_model_of(config: ModelConfig, dtype: str) -> Transformer:
    """Ten times the usual values: logits that differ enough for greedy to be stable."""
    model = model_of(config, dtype)
    for variable in named_parameters(model).values():
        value = variable.get_value()
        if value.ndim > 1 and value.dtype != jnp.int8:
            variable.set_value(value * 10)
    return model


def mesh_of(config: ModelConfig, shape: tuple[int, int, int], dp_attention: bool) -> Mesh:
    return make_mesh(*shape, copies=copies_of(config, *shape[1:], dp_attention))


def requests_of(count: int, seed: int) -> list[Request]:
    dice = random.Random(seed)
    shared = dice.choices(range(VOCAB), k=20)
    return [
        Request(
            id=str(i),
            prompt_ids=(
                *shared[: dice.choice([0, 0, 9, 20])],
                *dice.choices(range(VOCAB), k=dice.randint(1, 12)),
            ),
            sampling=SamplingParams(
                temperature=dice.choice([0.0, 0.0, 0.8]),
                top_p=dice.choice([1.0, 0.8]),
                presence_penalty=dice.choice([0.0, 0.0, 1.5]),
                seed=dice.randrange(2**31 - 4),
                top_logprobs=3,
            ),
            max_tokens=dice.randint(1, 25),
            n=dice.choice([1, 1, 3]),
            eos_ids=frozenset({dice.randrange(VOCAB)}),
        )
        for i in range(count)
    ]


Answers = dict[tuple[str, int], list[Drawn]]


def answers(model: Transformer, requests: list[Request], kv_dtype: Any = None) -> Answers:
    steps = compile_steps(model, LIMITS, kv_dtype=kv_dtype, has_masks=False)
    engine = engine_of(model, LIMITS, steps)
    for request in requests:
        engine.add(request)
    found: Answers = {}
    while engine.has_work:
        for event in engine.step():
            if event.drawn is not None:
                found.setdefault((event.request_id, event.choice), []).append(event.drawn)
    assert engine.scheduler.num_free_pages == engine.scheduler.num_pages
    return found


def check_equal(got: Answers, want: Answers, tolerance: float) -> None:
    assert got.keys() == want.keys()
    for key, draws in want.items():
        assert [d.token_id for d in got[key]] == [d.token_id for d in draws]
        np.testing.assert_allclose(
            [d.logprob for d in got[key]], [d.logprob for d in draws], rtol=0, atol=tolerance
        )


@functools.cache
def on_one_device(config: ModelConfig) -> tuple[Transformer, list[Request], Answers]:
    model, requests = large_model_of(config, "float32"), requests_of(12, 1)
    return model, requests, answers(model, requests)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "shape", "dp_attention"), EACH)
def test_the_step_under_a_mesh_equals_one_device(
    config: ModelConfig, shape: tuple[int, int, int], dp_attention: bool
) -> None:
    model, requests, want = on_one_device(config)
    mesh = mesh_of(config, shape, dp_attention)
    check_equal(answers(split_over(model, mesh, dp_attention), requests), want, 1e-5)


@pytest.mark.soak
def test_100_requests_under_a_mesh_equal_one_device() -> None:
    """More than fit: they wait, give way, and find one another's prefixes, on each side its own."""
    model, requests = large_model_of(MOE, "float32"), requests_of(100, 2)
    mesh = mesh_of(MOE, (1, 4, 2), False)
    check_equal(answers(split_over(model, mesh, False), requests), answers(model, requests), 1e-5)


def test_the_plain_loop_under_a_mesh_equals_one_device() -> None:
    model = large_model_of(MOE, "float32")
    many = split_over(model, mesh_of(MOE, (2, 2, 2), False), False)
    ids = [3, 1, 4, 1, 5]
    want = list(generate_draws(model, ids, max_tokens=10))
    got = list(generate_draws(many, ids, max_tokens=10))
    assert [draw.token_id for draw in got] == [draw.token_id for draw in want]
    np.testing.assert_allclose(
        [draw.logprob for draw in got], [draw.logprob for draw in want], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("dtype", "config", "shape"),
    [
        pytest.param(dtype, config, shape, id=f"{dtype}-{name}-{shape}", marks=marks)
        for dtype in ("int8", "int4", "mixed")
        for name, config in (("moe", MOE), ("dense", DENSE))
        for shape in MESHES
        for marks in [() if (dtype, name, shape) in ROUNDED else pytest.mark.soak]
    ],
)
def test_rounded_weights_under_a_mesh_are_as_near_to_floats_as_on_one_device(
    dtype: str, config: ModelConfig, shape: tuple[int, int, int]
) -> None:
    """Where a product is cut along its inputs, each part of a row is rounded with a scale of its
    own: not the same bits, but no further from what the weights would give unrounded rows."""
    if dtype in ("int4", "mixed"):  # each device has whole groups of 32 inputs
        config = replace(config, head_size=32, feed_forward_size=256)
    if dtype == "mixed":
        one = model_of(config, "int4", weight_dtypes=MIXED)
    else:
        one = model_of(config, dtype)
    exact = model_of(config)
    values = named_parameters(one)
    for name, variable in named_parameters(exact).items():
        value = values[name].get_value()
        if value.dtype == jnp.uint8:
            pairs = values[name.replace(".weight", ".scale")].get_value()
            value = Weight(value, pairs).widened(jnp.float32)
        if value.dtype == jnp.int8:
            scale = values[name.replace(".weight", ".scale")].get_value()
            if scale.dtype == jnp.float16:
                variable.set_value(Weight(value, scale).widened(jnp.float32))
                continue
            rest = (1,) * (value.ndim - scale.ndim)
            value = value.astype(jnp.float32) * scale.reshape(*scale.shape, *rest)
        variable.set_value(value)
    tokens = jax.random.randint(jax.random.key(0), (8, 20), 0, VOCAB)
    forward = jax.jit(lambda model, tokens: model(tokens))
    want = forward(exact, tokens)
    mesh = mesh_of(config, shape, False)
    rows = jax.device_put(tokens, ShardingRules.of(config, mesh).sharding("BT", mesh))
    many = split_over(one, mesh, False)
    apart = rms(forward(one, tokens) - want)
    assert 0 < apart < 0.03 * rms(want)
    assert rms(forward(many, rows) - want) < 1.2 * apart

    # The paged form: first tokens, as later ones follow tokens that rounding may have changed.
    requests = requests_of(8, 5)
    got, expected = answers(many, requests), answers(one, requests)
    assert got.keys() == expected.keys()
    first = [got[key][0].logprob - expected[key][0].logprob for key in expected]
    assert rms(np.asarray(first)) < 0.01


@pytest.mark.slow
def test_fp8_under_a_mesh_answers_as_on_one_device() -> None:
    """Rows that meet widened weights are not rounded, so parts of them add up to the same."""
    one = model_of(MOE, "fp8")
    many = split_over(one, mesh_of(MOE, (2, 2, 2), False), False)
    requests = requests_of(8, 5)
    check_equal(answers(many, requests), answers(one, requests), 1e-4)


def rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
