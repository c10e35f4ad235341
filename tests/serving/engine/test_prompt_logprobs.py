"""Logprobs of prompts, computed in the prefill, are those of the model's full form."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.checkpoint.adapter import StoredAdapter
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.adapter import AdapterConfig
from mixtral_jax.model.adapter_stack import StackSizes
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.scoring import score
from mixtral_jax.step.buckets import Steps
from mixtral_jax.structure.matcher import Guide
from serving.engine.build import compile_steps, engine_of
from serving.engine.engine import Engine
from serving.errors import ContextTooLong, InvalidRequest
from serving.scheduling.request import Event, FinishReason, Request, TokenScore
from tests.support.adapters import random_adapter
from tests.support.forms import LIMITS, TOKENIZER, regex
from tests.support.models import model_of

PROMPT = tuple(TOKENIZER.encode("the quick brown fox jumps over the lazy dog; " * 3))
GREEDY = SamplingParams(temperature=0.0)


def asking(name: str, prompt: tuple[int, ...] = PROMPT, **changes: Any) -> Request:
    """A request that asks for its prompt's logprobs, and draws two tokens."""
    values: dict[str, Any] = dict(
        prompt_ids=prompt,
        sampling=GREEDY,
        max_tokens=2,
        eos_ids=frozenset(),
        prompt_logprobs=3,
    )
    return Request(id=name, **{**values, **changes})


def run(
    engine: Engine,
    *requests: Request,
    between: Callable[[int], None] = lambda turn: None,
) -> dict[str, list[Event]]:
    """The events of each request, to the end of all; `between` is called before each turn."""
    for request in requests:
        engine.add(request)
    events: dict[str, list[Event]] = {request.id: [] for request in requests}
    for turn in range(500):
        between(turn)
        for event in engine.step():
            events[event.request_id].append(event)
        if not engine.has_work:
            return events
    raise AssertionError("it does not end")


def scores(events: list[Event]) -> list[TokenScore]:
    return [told for event in events for told in event.prompt_logprobs]


@cache
def full(model: Transformer) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda tokens: model(tokens))


def held_to_full(model: Transformer, prompt: tuple[int, ...], found: list[TokenScore]) -> None:
    """Compares with log_softmax of the full form: logprobs, ranks, and the likeliest three."""
    tokens = jnp.zeros((1, LIMITS.max_context), jnp.int32).at[0, : len(prompt)].set(prompt)
    logprobs = np.asarray(jax.nn.log_softmax(full(model)(tokens)[0], axis=-1))
    assert [told.token_id for told in found] == [*prompt[1:]]
    for row, told in zip(logprobs, found, strict=False):
        own = row[told.token_id]
        assert told.logprob == pytest.approx(own, abs=2e-5)
        assert 1 + (row > own + 1e-5).sum() <= told.rank <= 1 + (row > own - 1e-5).sum()
        values = [logprob for _, logprob in told.top_logprobs]
        np.testing.assert_allclose(values, np.sort(row)[::-1][: len(values)], atol=2e-5)
        for token, logprob in told.top_logprobs:
            assert logprob == pytest.approx(row[token], abs=2e-5)


def test_chunks_of_a_prompt_give_what_the_full_form_gives(model: Transformer, steps: Steps) -> None:
    """135 tokens in steps of 64, each in blocks; beside them a request that asks for none."""
    engine = engine_of(model, LIMITS, steps)
    quiet = replace(asking("quiet"), prompt_logprobs=None)
    events = run(engine, asking("asks"), quiet, asking("other", PROMPT[7:60], prompt_logprobs=0))
    held_to_full(model, PROMPT, scores(events["asks"]))
    assert len({len(told.top_logprobs) for told in scores(events["asks"])}) == 1
    held_to_full(model, PROMPT[7:60], scores(events["other"]))
    assert not scores(events["quiet"])
    tokens = [[e.drawn.token_id for e in events[name] if e.drawn] for name in ("asks", "quiet")]
    assert tokens[0] == tokens[1]
    first_token = next(i for i, event in enumerate(events["asks"]) if event.drawn)
    assert all(not event.prompt_logprobs for event in events["asks"][first_token:])
    assert sum(bool(event.prompt_logprobs) for event in events["asks"]) >= 3


def test_whatever_shares_its_steps_the_logprobs_are_the_same_bit_for_bit(
    model: Transformer, steps: Steps
) -> None:
    alone = run(engine_of(model, LIMITS, steps), asking("asks"))
    beside = run(
        engine_of(model, LIMITS, steps), asking("a", PROMPT[3:]), asking("asks"), asking("b")
    )
    assert scores(alone["asks"]) == scores(beside["asks"])


def test_nothing_is_generated_where_max_tokens_is_zero(model: Transformer, steps: Steps) -> None:
    engine = engine_of(model, LIMITS, steps)
    events = run(engine, asking("asks", max_tokens=0, n=2))
    held_to_full(model, PROMPT, scores(events["asks"]))
    assert all(event.drawn is None for event in events["asks"])
    ends = [(e.choice, e.finish_reason) for e in events["asks"] if e.finish_reason]
    assert ends == [(0, FinishReason.LENGTH), (1, FinishReason.LENGTH)]
    assert engine.scheduler.num_free_pages == LIMITS.num_pages
    full = (PROMPT * 2)[: LIMITS.max_context]
    assert len(scores(run(engine, asking("all", full, max_tokens=0))["all"])) == len(full) - 1
    with pytest.raises(ContextTooLong):
        engine.add(asking("too long", (*full, 1), max_tokens=0))
    for wrong in (dict(prompt_logprobs=None), dict(prompt=PROMPT[:1])):
        with pytest.raises(InvalidRequest):
            engine.add(asking("nothing", **{"max_tokens": 0, **wrong}))


def test_cached_pages_are_not_taken_for_tokens_whose_logprobs_are_asked_for(
    model: Transformer, steps: Steps
) -> None:
    engine = engine_of(model, LIMITS, steps)
    run(engine, replace(asking("warms"), prompt_logprobs=None))
    events = run(engine, asking("asks"))["asks"]
    held_to_full(model, PROMPT, scores(events))
    assert {event.cached for event in events} == {0}
    later = run(engine, replace(asking("later"), prompt_logprobs=None))["later"]
    assert later[-1].cached == (len(PROMPT) - 1) // LIMITS.page_size * LIMITS.page_size


def test_a_prompt_is_scored_once_whatever_becomes_of_its_pages(
    model: Transformer, steps: Steps
) -> None:
    """The device's pages are lost in mid-prompt and again in mid-answer; n choices follow it."""
    alone = scores(run(engine_of(model, LIMITS, steps), asking("asks"))["asks"])
    engine = engine_of(model, LIMITS, steps)

    def lose(turn: int) -> None:
        if turn in (2, 5):
            engine._open = None
            engine.scheduler.requeue_all()

    events = run(engine, asking("asks", max_tokens=6, n=3), between=lose)["asks"]
    assert scores(events) == alone
    assert {event.choice for event in events if event.prompt_logprobs} == {0}
    assert sum(event.drawn is not None for event in events) == 18


def test_a_row_with_a_grammar_is_scored_too(model: Transformer, steps: Steps, guide: Guide) -> None:
    engine = engine_of(model, LIMITS, steps)
    form = regex(guide, "[0-9]{5}")
    events = run(engine, asking("asks", form=form, max_tokens=9, eos_ids=TOKENIZER.eos_ids))["asks"]
    held_to_full(model, PROMPT, scores(events))
    drawn = [event.drawn.token_id for event in events if event.drawn]
    assert b"".join(map(TOKENIZER.token_bytes, drawn[:5])).isdigit()


@pytest.mark.slow
def test_adapters_of_a_step_and_a_mesh_have_the_logprobs_of_their_models() -> None:
    """Eight devices, four sequence groups; beside each other the model and one with an adapter."""
    config = replace(
        ModelConfig.tiny(vocab_size=64), num_heads=8, num_kv_heads=4, head_size=8, num_experts=8
    )
    settings = AdapterConfig(rank=4, alpha=8.0)
    adapter = random_adapter(config, settings, seed=1, size=0.3)
    stored = StoredAdapter(settings, adapter, "0" * 64, "base")
    model = model_of(config, mesh="expert=4,tensor=2", dp_attention=True)
    limits = replace(LIMITS, num_pages=32, max_sequences=2, max_step_tokens=8, max_context=32)
    sizes = StackSizes.all_targets(config, 1, 4)
    steps = compile_steps(model, limits, has_masks=False, adapters=sizes, buckets=(8,))
    engine = engine_of(model, limits, steps)
    engine.load_adapter("red", stored)
    prompt = (5, 6, 7, 8, 9, 10, 11, 12, 13, 14)
    events = run(
        engine,
        asking("plain", prompt, max_tokens=0),
        asking("red", prompt, max_tokens=0, adapter="red"),
        asking("other", prompt[3:], max_tokens=1),
    )
    alone = model_of(config)
    for name, beside in (("plain", None), ("red", adapter.folded(settings))):
        (wanted,) = score(alone, None, [prompt], adapter=beside)
        found = scores(events[name])
        assert [one.token_id for one in found] == [*prompt[1:]]
        np.testing.assert_allclose([one.logprob for one in found], wanted.logprobs, atol=5e-5)
