"""With `deterministic`, rows of adapters and of the base have the same bits whatever runs beside.

An int8 base keeps its own bits beside adapters, and its adapters are those of the values it has.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.checkpoint.adapter import StoredAdapter
from mixtral_jax.config import ModelConfig
from mixtral_jax.generation import generate_tokens
from mixtral_jax.kernels.cpu import build
from mixtral_jax.model.adapter import AdapterConfig
from mixtral_jax.model.adapter_stack import StackSizes
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.step.buckets import Steps
from serving.engine.build import compile_steps, engine_of
from serving.engine.engine import Engine
from serving.scheduling.request import Drawn, Priority, Request
from serving.scheduling.step_plan import Limits
from tests.support.adapters import random_adapter
from tests.support.models import model_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not build.available(), reason="promised with the kernels only"),
]
# A mixture of four experts, two of them for each token; heads as the promise asks for.
CONFIG = replace(ModelConfig.tiny(vocab_size=64), sliding_window=None)
ROOMY = Limits(
    num_pages=60,
    page_size=4,
    max_sequences=8,
    max_step_tokens=8,
    max_context=48,
    max_waiting=99,
    deterministic=True,
)
# Chunks of other sizes, and preemptions for want of pages.
CROWDED = replace(ROOMY, num_pages=24, max_sequences=6, max_step_tokens=7)
ALL = ("q", "k", "v", "o", "router", "gate", "up", "down")
SETTINGS = {
    "red": AdapterConfig(targets=ALL, rank=4, alpha=8.0),
    "blue": AdapterConfig(targets=("v", "down"), rank=2, alpha=8.0),
}
SHARED = tuple(range(3, 15))  # three pages that prompts begin with
Answers = dict[tuple[str, int], list[Drawn]]


@cache
def steps_of(dtype: str) -> Steps:
    stacks = StackSizes(slots=2, rank=4, targets=ALL)
    return compile_steps(model_of(CONFIG, dtype), ROOMY, has_masks=False, adapters=stacks)


def engine_with_adapters(limits: Limits, dtype: str = "float32") -> Engine:
    engine = engine_of(model_of(CONFIG, dtype), limits, steps_of(dtype))
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        adapter = random_adapter(CONFIG, settings, seed=seed, size=0.3)
        engine.load_adapter(name, StoredAdapter(settings, adapter, f"{seed:064}", "base"))
    return engine


def engine_without_adapters(dtype: str = "float32") -> Engine:
    return engine_of(model_of(CONFIG, dtype), ROOMY, replace(steps_of(dtype), adapters=None))


def requests(count: int) -> list[Request]:
    """Requests of both adapters and the base: greedy, hot, penalised, one or two choices."""
    dice = np.random.default_rng(7)
    ways = [
        SamplingParams(temperature=0.0, top_logprobs=3),
        SamplingParams(temperature=1.5, seed=3, top_logprobs=3),
        SamplingParams(temperature=0.9, seed=4, frequency_penalty=1.0, top_logprobs=1),
    ]
    return [
        Request(
            id=str(i),
            prompt_ids=(*SHARED[: 12 * (i % 4 != 3)], *dice.integers(0, 64, 1 + i % 5).tolist()),
            sampling=ways[i // 3 % 3],
            max_tokens=10 + i % 3,
            eos_ids=frozenset(),
            n=1 + (i % 5 == 0),
            adapter=("red", "", "blue")[i % 3],
            priority=Priority.BATCH if i % 2 else Priority.INTERACTIVE,
        )
        for i in range(count)
    ]


def answers(engine: Engine, asked: Sequence[Request], every: int = 0) -> Answers:
    """The draws of each choice; of each few steps, `every` of them, one brings a new request."""
    coming: Iterator[Request] = iter(asked)
    if not every:
        for request in coming:
            engine.add(request)
    drawn: Answers = {}
    turn = 0
    while engine.has_work or turn == 0 or (every and len(drawn) < sum(r.n for r in asked)):
        if every and turn % every == 0 and (request := next(coming, None)) is not None:
            engine.add(request)
        for event in engine.step():
            if event.drawn is not None:
                drawn.setdefault((event.request_id, event.choice), []).append(event.drawn)
        turn += 1
    return drawn


def test_the_same_bits_alone_and_among_rows_of_other_adapters() -> None:
    """Tokens and logprobs, with prefix hits, chunks and preemptions, and without any of them."""
    asked = requests(18)
    single = engine_with_adapters(ROOMY)
    alone: Answers = {}
    for request in asked:
        alone |= answers(single, [request])
    assert single.scheduler.prefix_hit_tokens > 0
    others = [
        (engine_with_adapters(ROOMY), 0),
        (engine_with_adapters(CROWDED), 2),
        (engine_with_adapters(replace(ROOMY, prefix_reuse=False)), 1),
    ]
    for engine, every in others:
        assert answers(engine, asked, every) == alone
    assert others[1][0].scheduler.preemptions > 0
    # An engine that has no adapter at all gives the base's rows the same bits.
    base = engine_without_adapters()
    own = [request for request in asked if not request.adapter]
    assert answers(base, own) == {
        key: draws for key, draws in alone.items() if any(key[0] == r.id for r in own)
    }
    # Each adapter has answers of its own.
    reds = replace(asked[0], n=1, id="same")
    texts = [
        [d.token_id for d in answers(single, [replace(reds, adapter=name)])["same", 0]]
        for name in ("", "red", "blue")
    ]
    assert len({tuple(text) for text in texts}) == 3


@pytest.mark.soak
def test_an_int8_base_has_its_bits_and_its_adapters_beside_it() -> None:
    """The twin of an adapter beside rounded weights is the full form of the two, without steps."""
    model = model_of(CONFIG, "int8")
    prompt = (*SHARED, 40, 41)
    asked = [
        Request(
            id=f"{name}-{i}",
            prompt_ids=prompt,
            sampling=SamplingParams(temperature=0.0, top_logprobs=3),
            max_tokens=8,
            eos_ids=frozenset(),
            adapter=name,
        )
        for i in range(2)
        for name in ("", "red", "blue")
    ]
    beside = answers(engine_with_adapters(ROOMY, "int8"), asked)
    plain = engine_without_adapters("int8")
    own = answers(plain, [request for request in asked if not request.adapter])
    assert {key: beside[key] for key in own} == own
    assert [d.token_id for d in own["-0", 0]] == list(generate_tokens(model, prompt, max_tokens=8))
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        adapter = random_adapter(CONFIG, settings, seed=seed, size=0.3).folded(settings)
        drawn = beside[f"{name}-0", 0]
        assert beside[f"{name}-1", 0] == drawn
        # One call with the whole answer: each of its tokens is the likeliest one at its place.
        ids = [*prompt, *(d.token_id for d in drawn)]
        scores = np.asarray(model(jnp.asarray([ids[:-1]]), adapter))[0, len(prompt) - 1 :]
        assert np.argmax(scores, axis=-1).tolist() == ids[len(prompt) :], name
        logprobs = scores - np.log(np.sum(np.exp(scores), axis=-1, keepdims=True))
        got = [d.logprob for d in drawn]
        want = logprobs[np.arange(len(drawn)), ids[len(prompt) :]]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-3)
