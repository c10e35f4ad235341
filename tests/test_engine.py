"""The engine gives what the plain loop gives, token for token."""

import random

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mixtral_jax.config import ModelConfig
from mixtral_jax.generation import generate_tokens
from mixtral_jax.model import Transformer
from serving.engine import Engine, buckets, compile_steps
from serving.request import Request, SamplingParams
from serving.scheduler import Limits

LIMITS = Limits(
    num_pages=24, page_size=8, max_sequences=4, max_step_tokens=24, max_context=96, max_waiting=99
)
VOCAB = 61


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig._with(
        ModelConfig.tiny(vocab_size=VOCAB), sliding_window=13, max_context=96
    )
    model = Transformer(config, rngs=nnx.Rngs(0))
    # Weights of ten times the usual size: logits that differ enough for greedy to be stable.
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, state))


@pytest.fixture(scope="module")
def engine(model: Transformer) -> Engine:
    return Engine(model, LIMITS, compile_steps(model, LIMITS))


def random_requests(count: int) -> list[Request]:
    dice = random.Random(4)
    return [
        Request(
            id=str(i),
            prompt_ids=tuple(dice.randrange(VOCAB) for _ in range(dice.randint(1, 60))),
            sampling=SamplingParams(
                temperature=dice.choice([0.0, 0.7, 1.3]),
                top_p=dice.choice([1.0, 0.8]),
                seed=dice.randrange(2**31),
            ),
            max_tokens=dice.randint(1, 30),
            eos_ids=frozenset({dice.randrange(VOCAB)}),
        )
        for i in range(count)
    ]


def alone(model: Transformer, request: Request) -> list[int]:
    return list(
        generate_tokens(
            model,
            request.prompt_ids,
            max_tokens=request.max_tokens,
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            seed=request.sampling.seed,
            eos_ids=request.eos_ids,
        )
    )


def test_mixed_arrivals_equal_the_plain_loop(model: Transformer, engine: Engine) -> None:
    dice = random.Random(5)
    requests = random_requests(30)
    out: dict[str, list[int]] = {request.id: [] for request in requests}
    finished, cancelled, waiting = set(), set(), list(requests)
    while waiting or engine.has_work:
        for _ in range(dice.randint(0, 3)):
            if waiting:
                engine.add(waiting.pop(0))
        for event in engine.step():
            out[event.request_id].append(event.token_id)
            if event.finish_reason is not None:
                finished.add(event.request_id)
        if dice.random() < 0.05:
            victim = dice.choice(requests)
            if victim not in waiting and victim.id not in finished:
                engine.cancel(victim.id)
                cancelled.add(victim.id)
    assert cancelled and finished | cancelled == set(out)
    for request in requests:
        want = alone(model, request)
        if request.id in cancelled:
            want = want[: len(out[request.id])]
        assert out[request.id] == want, request
    assert engine.scheduler.num_free_pages == LIMITS.num_pages


def test_an_idle_step_does_nothing(engine: Engine) -> None:
    assert engine.step() == []


def test_buckets_hold_every_step() -> None:
    assert buckets(LIMITS) == (1, 4, 24)
    wide = Limits(
        num_pages=1, page_size=1, max_sequences=8, max_step_tokens=512, max_context=1, max_waiting=1
    )
    assert buckets(wide) == (1, 8, 128, 512)


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
        next(generate_tokens(model, [], max_tokens=1))
    with pytest.raises(ValueError, match="96 tokens, the context of this model holds 96"):
        next(generate_tokens(model, [1] * 96, max_tokens=1))
