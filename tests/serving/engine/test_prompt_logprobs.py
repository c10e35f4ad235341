"""Logprobs of prompts, computed in the prefill, are those of the model's full form."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.step.buckets import Steps
from mixtral_jax.structure.matcher import Guide
from serving.engine.build import compile_steps, engine_of
from serving.engine.engine import Engine
from serving.errors import ContextTooLong, InvalidRequest
from serving.scheduling.request import Event, FinishReason, Request, TokenScore
from tests.support.forms import LIMITS, TOKENIZER, regex

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
    return [score for event in events for score in event.prompt_logprobs]


def held_to_full(model: Transformer, prompt: tuple[int, ...], found: list[TokenScore]) -> None:
    """Compares with log_softmax of the full form: logprobs, ranks, and the likeliest three."""
    logits = model(jnp.asarray([prompt]))[0]
    logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    assert [score.token_id for score in found] == [*prompt[1:]]
    for row, score in zip(logprobs, found, strict=False):
        own = row[score.token_id]
        assert score.logprob == pytest.approx(own, abs=2e-5)
        assert 1 + (row > own + 1e-5).sum() <= score.rank <= 1 + (row > own - 1e-5).sum()
        values = [logprob for _, logprob in score.top_logprobs]
        np.testing.assert_allclose(values, np.sort(row)[::-1][: len(values)], atol=2e-5)
        for token, logprob in score.top_logprobs:
            assert logprob == pytest.approx(row[token], abs=2e-5)


def test_chunks_of_a_prompt_give_what_the_full_form_gives(model: Transformer, steps: Steps) -> None:
    """135 tokens in steps of 64, each in blocks; beside them a request that asks for none."""
    engine = engine_of(model, LIMITS, steps)
    quiet = replace(asking("quiet"), prompt_logprobs=None)
    events = run(engine, asking("asks"), quiet, asking("other", PROMPT[7:60], prompt_logprobs=0))
    held_to_full(model, PROMPT, scores(events["asks"]))
    assert len({len(score.top_logprobs) for score in scores(events["asks"])}) == 1
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


def test_a_sequence_that_gives_way_in_mid_prompt_goes_on_where_its_logprobs_ended(
    model: Transformer,
) -> None:
    """A pool of 48 pages holds one prompt of 135 tokens and its answer, and not two."""
    limits = replace(LIMITS, num_pages=48, max_step_tokens=16, max_context=192)
    engine = engine_of(model, limits, compile_steps(model, limits, has_masks=False))
    long = asking("long", max_tokens=40, caller="a", prompt_logprobs=1)
    events = run(engine, long, replace(long, id="second"), replace(long, id="third", caller="b"))
    for name in ("long", "second", "third"):
        held_to_full(model, PROMPT, scores(events[name]))
        assert sum(event.drawn is not None for event in events[name]) == 40
    assert engine.scheduler.preemptions > 0


def test_a_row_with_a_grammar_is_scored_too(model: Transformer, steps: Steps, guide: Guide) -> None:
    engine = engine_of(model, LIMITS, steps)
    form = regex(guide, "[0-9]{5}")
    events = run(engine, asking("asks", form=form, max_tokens=9, eos_ids=TOKENIZER.eos_ids))["asks"]
    held_to_full(model, PROMPT, scores(events))
    drawn = [event.drawn.token_id for event in events if event.drawn]
    assert b"".join(map(TOKENIZER.token_bytes, drawn[:5])).isdigit()
