"""The engine gives what the plain loop gives, token for token, and always the same bits."""

import os
import random
from dataclasses import replace
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mixtral_jax.config import ModelConfig
from mixtral_jax.generation import generate_draws, generate_tokens
from mixtral_jax.kernels.cpu import build
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sampling_params import SamplingParams
from serving.engine import build as engines
from serving.engine.build import compile_steps
from serving.engine.engine import Engine
from serving.scheduling.request import Drawn, Request
from serving.scheduling.step_plan import Limits
from tests.support.models import model_of

VOCAB = 61
SMALL = Limits(
    num_pages=24,
    page_size=4,
    max_sequences=8,
    max_step_tokens=24,
    max_context=96,
    max_waiting=999,
)


def limits(**changes: Any) -> Limits:
    return replace(SMALL, **changes)


def toy(window: int | None, dtype: str, max_context: int = 96) -> Transformer:
    config = replace(
        ModelConfig.tiny(vocab_size=VOCAB), sliding_window=window, max_context=max_context
    )
    model = model_of(config, dtype=dtype)
    graph, state = nnx.split(model)

    def larger(x: jax.Array) -> jax.Array:
        """Ten times the usual size: logits that differ enough for greedy to be stable."""
        return x * 10 if x.ndim > 1 and x.dtype != jnp.int8 else x

    return nnx.merge(graph, jax.tree.map(larger, state))


@pytest.fixture(scope="module", params=["float32", "int8"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return toy(None, request.param)


def engine_of(model: Transformer, limits: Limits, kv_dtype: str | None = None) -> Engine:
    steps = compile_steps(model, limits, kv_dtype=kv_dtype, has_masks=False)
    return engines.engine_of(model, limits, steps)


def random_requests(count: int, seed: int = 4) -> list[Request]:
    dice = random.Random(seed)
    shared = [dice.randrange(VOCAB) for _ in range(40)]

    def prompt() -> tuple[int, ...]:
        own = [dice.randrange(VOCAB) for _ in range(dice.randint(1, 12))]
        return tuple(shared[: dice.choice([0, 0, 0, 5, 9, 24])] + own)

    return [
        Request(
            id=str(i),
            prompt_ids=prompt(),
            sampling=SamplingParams(
                temperature=dice.choice([0.0, 0.0, 0.7, 1.3]),
                top_p=dice.choice([1.0, 0.8]),
                top_k=dice.choice([0, 5]),
                min_p=dice.choice([0.0, 0.1]),
                presence_penalty=dice.choice([0.0, 0.0, 1.5]),
                frequency_penalty=dice.choice([0.0, 0.0, 0.5]),
                repetition_penalty=dice.choice([1.0, 1.0, 1.3]),
                logit_bias=dice.choice([{}, {dice.randrange(VOCAB): 5.0}]),
                seed=dice.randrange(2**31 - 4),
                top_logprobs=dice.choice([None, None, 0, 3]),
            ),
            max_tokens=dice.randint(1, 55),
            min_tokens=dice.choice([0, 0, 5]),
            n=dice.choice([1, 1, 1, 3]),
            eos_ids=frozenset({dice.randrange(VOCAB)}),
        )
        for i in range(count)
    ]


def alone(
    model: Transformer, request: Request, choice: int, kv_dtype: str | None = None
) -> list[Drawn]:
    """What the plain loop gives; all answers are of one length, so that it compiles once."""
    assert request.sampling.seed is not None
    draws = generate_draws(
        model,
        request.prompt_ids,
        replace(request.sampling, seed=request.sampling.seed + choice),
        max_tokens=model.config.max_context,
        min_tokens=request.min_tokens,
        eos_ids=request.eos_ids,
        kv_dtype=kv_dtype,
    )
    return [
        Drawn(token_id=d.token_id, logprob=d.logprob, top_logprobs=d.top_logprobs)
        for d in islice(draws, request.max_tokens)
    ]


Answers = dict[tuple[str, int], list[Drawn]]


def serve(
    engine: Engine, requests: list[Request], seed: int, cancel: float = 0.0
) -> tuple[Answers, set[str]]:
    """Answers by request and choice, and who was cancelled; they come and go at random times."""
    dice = random.Random(seed)
    out: Answers = {(r.id, c): [] for r in requests for c in range(r.n)}
    live, cancelled, waiting = {key: True for key in out}, set[str](), list(requests)
    while waiting or engine.has_work:
        for _ in range(dice.randint(0, 3)):
            if waiting:
                engine.add(waiting.pop(0))
        for event in engine.step():
            assert event.request_id not in cancelled
            if event.drawn is not None:
                out[event.request_id, event.choice].append(event.drawn)
            live[event.request_id, event.choice] = event.finish_reason is None
        if dice.random() < cancel:
            arrived = [r for r in requests if r not in waiting and r.id not in cancelled]
            unfinished = [r for r in arrived if any(live[r.id, c] for c in range(r.n))]
            if unfinished:
                victim = dice.choice(unfinished)
                engine.cancel(victim.id)
                cancelled.add(victim.id)
    return out, cancelled


def assert_near(got: list[Drawn], want: list[Drawn]) -> None:
    """The same tokens; logprobs that were summed up in another program differ in the last bits."""
    assert [d.token_id for d in got] == [d.token_id for d in want]
    for ours, theirs in zip(got, want, strict=True):
        assert (ours.logprob is None) == (theirs.logprob is None)
        if ours.logprob is not None:
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [i for i, _ in ours.top_logprobs] == [i for i, _ in theirs.top_logprobs]


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["float32", pytest.param("int8", marks=pytest.mark.soak)], indirect=True
)
def test_200_requests_in_too_few_pages_equal_the_plain_loop(model: Transformer) -> None:
    """A part of them without MIXTRAL_JAX_SOAK=1."""
    engine = engine_of(model, SMALL)
    requests = random_requests(200 if "MIXTRAL_JAX_SOAK" in os.environ else 30)
    count = len(requests)
    out, cancelled = serve(engine, requests, seed=5, cancel=0.05)
    assert len(cancelled) > count // 20
    assert engine.scheduler.preemptions > count // 3
    assert engine.scheduler.prefix_hit_tokens > count
    for request in requests:
        for choice in range(request.n):
            got, want = out[request.id, choice], alone(model, request, choice)
            if request.id in cancelled:
                want = want[: len(got)]
            assert_near(got, want)
    assert engine.scheduler.num_free_pages == SMALL.num_pages


@pytest.mark.slow
@pytest.mark.skipif(not build.available(), reason="another program may round the other way")
@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_small_pages_equal_the_plain_loop_with_such_pages(dtype: str) -> None:
    """Preempted, forked and found again: what was rounded once is the same rounded later."""
    model = toy(None, "float32")
    engine = engine_of(model, SMALL, kv_dtype=dtype)
    requests = random_requests(30)
    out, _ = serve(engine, requests, seed=5)
    assert engine.scheduler.preemptions > 10
    for request in requests:
        for choice in range(request.n):
            assert_near(out[request.id, choice], alone(model, request, choice, dtype))


@pytest.mark.slow
def test_a_window_needs_no_more_pages_than_two_windows() -> None:
    """A context of ten windows: the same tokens as the full form gives, and no page leaks."""
    model = toy(16, "float32", max_context=160)
    narrow = limits(num_pages=8, max_context=160, window=16, max_sequences=1, max_step_tokens=8)
    assert narrow.num_pages * narrow.page_size == 2 * 16
    engine = engine_of(model, narrow)
    prompt = tuple(random.Random(1).randrange(VOCAB) for _ in range(100))
    request = Request(
        id="long",
        prompt_ids=prompt,
        sampling=SamplingParams(temperature=0.0, top_logprobs=3),
        max_tokens=60,
        eos_ids=frozenset(),
    )
    out, _ = serve(engine, [request], seed=0)
    answer = out["long", 0]
    ids = [*prompt, *(drawn.token_id for drawn in answer)]
    assert len(ids) == 160
    logits = jax.jit(lambda model, ids: model(ids))(model, jnp.asarray([ids]))
    logprobs = jax.nn.log_softmax(logits[0])
    for place, drawn in enumerate(answer, start=len(prompt) - 1):
        assert drawn.token_id == jnp.argmax(logprobs[place])
        top, order = jax.lax.top_k(logprobs[place], 3)
        assert [i for i, _ in drawn.top_logprobs] == order.tolist()
        assert [p for _, p in drawn.top_logprobs] == pytest.approx(top.tolist(), abs=1e-4)
    assert engine.scheduler.num_free_pages == narrow.num_pages


@pytest.mark.slow
@pytest.mark.skipif(not build.available(), reason="promised with the kernels only")
@pytest.mark.parametrize(
    "model", ["int8", pytest.param("float32", marks=pytest.mark.soak)], indirect=True
)
def test_the_same_bits_alone_and_among_63_others(model: Transformer) -> None:
    """Tokens and logprobs, whatever the batch, chunks, prefix hits and preemptions."""
    requests = [
        replace(r, sampling=replace(r.sampling, top_logprobs=3)) for r in random_requests(64)
    ]
    worlds = [
        limits(deterministic=True),
        limits(num_pages=999, max_step_tokens=64, prefix_reuse=False, deterministic=True),
        limits(num_pages=30, max_step_tokens=9, deterministic=True),
    ]
    crowded = [serve(engine_of(model, world), requests, seed=6, cancel=0.02)[0] for world in worlds]
    single = engine_of(model, limits(num_pages=99, deterministic=True))
    for request in requests[:20]:
        answers, _ = serve(single, [request], seed=0)
        for key, answer in answers.items():
            for crowd in crowded:
                assert crowd[key] == answer[: len(crowd[key])], key


def test_an_idle_step_does_nothing(model: Transformer) -> None:
    assert engine_of(model, SMALL).step() == []


@pytest.mark.slow
def test_the_plain_loop_equals_the_full_form(model: Transformer) -> None:
    """Greedy, by running the whole sequence anew for every token."""
    full = jax.jit(lambda model, tokens: model(tokens))
    ids = [5, 9, 2]
    for at in range(len(ids), 15):
        padded = jnp.asarray([ids + [0] * (15 - at)])
        ids.append(int(jnp.argmax(full(model, padded)[0, at - 1])))
    assert list(generate_tokens(model, ids[:3], max_tokens=12)) == ids[3:]


def test_prompts_that_do_not_fit(model: Transformer) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate_tokens(model, [], max_tokens=1)
    with pytest.raises(ValueError, match="96 tokens, the context of this model holds 96"):
        generate_tokens(model, [1] * 96, max_tokens=1)
