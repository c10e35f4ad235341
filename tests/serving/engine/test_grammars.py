"""Answers that are held to a grammar, by an engine on a toy model."""

import itertools
import json
import re
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher

from mixtral_jax.errors import StructureError
from mixtral_jax.generation import generate, generate_draws
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.step.buckets import Steps
from mixtral_jax.structure.form import Form
from mixtral_jax.structure.matcher import Guide, Matcher
from serving.cluster.codec import masks_message, masks_of
from serving.cluster.plan_check import PlanCheck
from serving.engine.build import engine_of
from serving.engine.device import Masks, Order, Walk
from serving.engine.engine import Engine
from serving.engine.grammars import Grammars
from serving.engine.runner import Runner, RunningStep, WalkedPlans
from serving.proto import group_pb2 as pb
from serving.scheduling.request import FinishReason
from tests.support.forms import (
    LIMITS,
    SCHEMA,
    TOKENIZER,
    ids,
    is_person,
    regex,
    request,
    served,
    text,
)


def test_answers_match_their_schema_among_others_that_have_none(
    model: Transformer, steps: Steps, person: Form
) -> None:
    """Hot and cold, alone and several, with logprobs and penalties, at all of which the likeliest
    tokens of a random model are no JSON; and the model's end may be ignored or forbidden."""
    engine = engine_of(model, LIMITS, steps)
    asked = [
        request("hot", person, n=3),
        request("cold", person, sampling=SamplingParams(temperature=0.0)),
        request("logprobs", person, sampling=SamplingParams(seed=1, top_logprobs=2)),
        request("penalties", person, sampling=SamplingParams(seed=2, frequency_penalty=2.0)),
        request("endless", person, eos_ids=frozenset()),
        request("late end", person, min_tokens=100),
        request("plain", None, sampling=SamplingParams(temperature=0.0), max_tokens=30),
    ]
    events = served(engine, *asked)
    assert len(events) == 9
    for (name, _), of_choice in events.items():
        if name == "plain":
            continue
        assert is_person(text(of_choice)), text(of_choice)
        assert of_choice[-1].finish_reason is FinishReason.STOP
        drawn = [event.drawn for event in of_choice if event.drawn is not None]
        if name == "logprobs":
            assert all(one.logprob is not None and len(one.top_logprobs) == 2 for one in drawn)
            assert not any(one.forced for one in drawn)
        else:
            # {"name":" and ","age": and ,"ok": and all of true or false but its first letter.
            assert sum(one.forced for one in drawn) >= 9 + 7 + 6 + 3
    alone = served(engine_of(model, LIMITS, steps), asked[-1])
    assert ids(alone["plain", 0]) == ids(events["plain", 0])
    assert engine.scheduler.num_free_pages == LIMITS.num_pages


def test_forced_tokens_take_no_steps_of_their_own(
    model: Transformer, steps: Steps, guide: Guide
) -> None:
    """20 certain characters, one of two, 20 certain ones and the end. The prompt's step draws
    nothing; three have the certain ones, 8, 8 and 4 as there are 8 rows, of which the last draws;
    and while the fifth computes what was drawn the rest is known."""
    form = regex(guide, "[x]{20}[ab][y]{20}")
    # A late mask takes a step more, and a busy machine makes masks late.
    masks = Grammars(-(-TOKENIZER.vocab_size // 32), patience=60)
    engine = Engine(Runner(model, steps), LIMITS, masks=masks)
    engine.add(request("A", form))
    count, answer = 0, []
    while engine.has_work:
        count += 1
        answer += [event for event in engine.step() if event.drawn]
    assert re.fullmatch("x{20}[ab]y{20}", text(answer))
    assert [event.drawn.forced for event in answer if event.drawn].count(False) == 1
    assert count == 6  # turns: the last one commits the fifth step


def test_a_call_begins_when_the_model_says_so(
    model: Transformer, steps: Steps, guide: Guide
) -> None:
    """Nothing is masked before the trigger, here "(", which the form takes in as its first token;
    a bias makes the model draw it at once, or never."""
    trigger = TOKENIZER.encode("(")[-1]
    form = regex(guide, r"\([0-9]{3}\)", begins_after=trigger)
    likely = SamplingParams(temperature=0.0, logit_bias={trigger: 100.0})
    never = SamplingParams(temperature=0.0, logit_bias={trigger: -100.0})
    asked = [
        request("calls", form, sampling=likely),
        request("talks", form, sampling=never, max_tokens=20),
        request("free", None, sampling=never, max_tokens=20),
    ]
    asked[2] = replace(asked[2], prompt_ids=asked[1].prompt_ids)
    events = served(engine_of(model, LIMITS, steps), *asked)
    assert re.fullmatch(r"\([0-9]{3}\)", text(events["calls", 0]))
    assert events["calls", 0][-1].finish_reason is FinishReason.STOP
    assert ids(events["talks", 0]) == ids(events["free", 0])


def test_a_row_draws_its_allowed_ids_alone(model: Transformer, steps: Steps) -> None:
    """Beside a row that may draw all, also before its end may come, and whatever it is biased to;
    the neighbour draws what it draws without it."""
    a, b, c = TOKENIZER.encode("abc")[-3:]
    end = min(TOKENIZER.eos_ids)
    biased = SamplingParams(temperature=1.5, seed=3, logit_bias={c: 100.0})
    some = request("some", None, sampling=biased, n=2, max_tokens=20)
    some = replace(some, allowed_ids=frozenset({a, b}))
    only = replace(request("only", None, max_tokens=5), allowed_ids=frozenset({a}))
    late = replace(
        request("late", None, sampling=replace(biased, logit_bias={end: 100.0}), max_tokens=8),
        allowed_ids=frozenset({b, end}),
        min_tokens=3,
    )
    free = request("free", None, max_tokens=20)
    engine = engine_of(model, LIMITS, steps)
    events = served(engine, some, only, late, free)
    assert {*ids(events["some", 0])} == {*ids(events["some", 1])} == {a, b}
    assert ids(events["only", 0]) == [a] * 5
    assert ids(events["late", 0]) == [b, b, b, end]
    alone = served(engine_of(model, LIMITS, steps), free)
    assert ids(alone["free", 0]) == ids(events["free", 0])
    assert engine.scheduler.num_free_pages == LIMITS.num_pages


def test_a_form_and_allowed_ids_hold_together(
    model: Transformer, steps: Steps, guide: Guide
) -> None:
    """The model's end needs no allowance where the form lets the answer end; where both together
    let nothing follow, the request ends alone and says so."""
    allowed = frozenset(TOKENIZER.encode("xab")[-3:])
    both = replace(request("both", regex(guide, "x[a-z]{8}x")), allowed_ids=allowed)
    none = replace(request("none", regex(guide, "[ab][c-w]")), allowed_ids=allowed)
    events = served(engine_of(model, LIMITS, steps), both, none)
    assert re.fullmatch("x[xab]{8}x", text(events["both", 0]))
    assert events["both", 0][-1].finish_reason is FinishReason.STOP
    assert len(events["none", 0]) == 2
    last = events["none", 0][-1]
    assert last.is_refused and last.problem.startswith("allowed_token_ids has no token that the")


def test_preempted_answers_keep_to_their_allowed_ids(model: Transformer, steps: Steps) -> None:
    """12 answers of 60 tokens with pages for 110 tokens draw what each draws alone."""
    allowed = frozenset(TOKENIZER.encode("abcdefgh")[-8:])
    asked = [replace(request(f"r{i}", None, max_tokens=60), allowed_ids=allowed) for i in range(12)]
    small, tight = replace(LIMITS, num_pages=300), replace(LIMITS, num_pages=28)
    engine = Engine(Runner(model, steps), tight, masks=Grammars(-(-TOKENIZER.vocab_size // 32)))
    together = served(engine, *asked)
    assert engine.scheduler.preemptions > 0
    for one in asked[::4]:
        alone = served(engine_of(model, small, steps), one)
        assert ids(alone[one.id, 0]) == ids(together[one.id, 0])
        assert set(ids(alone[one.id, 0])) <= allowed


def test_other_hosts_draw_the_same_under_the_masks_that_travel(
    model: Transformer, steps: Steps, person: Form
) -> None:
    """A runner that is told everything by messages draws what the engine's own drew."""
    orders: list[Order] = []
    drawn: list[Any] = []

    class Recorded(Runner):
        def draw(self, walked: WalkedPlans, masks: Masks | None) -> RunningStep:
            running = super().draw(walked, masks)
            drawn.append(np.asarray(running.launched.packed))
            return running

    own = Recorded(model, steps)
    engine = Engine(own, LIMITS, orders.append, Grammars(-(-TOKENIZER.vocab_size // 32)))
    letters = frozenset(TOKENIZER.encode("abc")[-3:])
    asked = [request("A", person), request("B", person, n=2), request("C", None)]
    served(engine, *asked, request("D", None, allowed_ids=letters, max_tokens=20))
    assert any(isinstance(order, Masks) for order in orders)
    assert any(isinstance(order, tuple) for order in orders)
    count = len(drawn)
    other, walked = Recorded(model, steps), None
    check = PlanCheck(LIMITS, 1, TOKENIZER.vocab_size)
    for order in orders:
        match order:
            case Masks():
                assert walked is not None
                message = pb.Masks.FromString(masks_message(order).SerializeToString())
                check.check_masks(message, walked.plans)
                other.draw(walked, masks_of(message, walked.plans))
            case Walk(plans):
                walked = other.walk(plans)
            case plans:
                other.launch(plans)
    assert len(drawn) == 2 * count
    for mine, theirs in zip(drawn[:count], drawn[count:], strict=True):
        assert (mine == theirs).all()


def test_a_matcher_in_error_ends_its_request_alone_and_not_as_if_whole(
    model: Transformer, steps: Steps, guide: Guide, person: Form
) -> None:
    """A matcher that has taken in a token which may not follow."""
    broken = guide.matcher(LLMatcher.grammar_from_regex("[a-c]+"))
    with pytest.raises(StructureError):
        broken.consume(TOKENIZER.encode("x")[-1:])
    engine = engine_of(model, LIMITS, steps)
    events = served(engine, request("bad", Form(broken), n=2), request("good", person))
    (failed,) = events["bad", 0]
    assert failed.finish_reason is FinishReason.FAILED and failed.drawn is None
    assert failed.problem.startswith("the answer cannot be held to its form any longer: ")
    assert is_person(text(events["good", 0])) and engine.num_failures == 0
    assert engine.scheduler.num_free_pages == LIMITS.num_pages


def test_a_late_mask_makes_its_row_sit_out_and_changes_no_answer(
    model: Transformer, steps: Steps, person: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third mask takes 40 ms, where 20 are waited for."""
    asked = [request("A", person), request("B", person, n=2), request("C", None, max_tokens=20)]
    punctual = served(engine_of(model, LIMITS, steps), *asked)
    fill, count = Matcher.fill, itertools.count()

    def slow_fill(self: Matcher, mask: np.ndarray) -> None:
        if next(count) % 3 == 0:
            time.sleep(0.04)
        fill(self, mask)

    monkeypatch.setattr(Matcher, "fill", slow_fill)
    late = served(engine_of(model, LIMITS, steps), *asked)
    assert {key: ids(events) for key, events in late.items()} == {
        key: ids(events) for key, events in punctual.items()
    }


def test_preempted_answers_go_on_as_if_nothing_had_been(
    model: Transformer, steps: Steps, person: Form
) -> None:
    """12 answers of some 60 tokens with pages for 110 tokens, and alone."""
    small = replace(LIMITS, num_pages=300)
    asked = [request(f"r{i}", person, max_tokens=60) for i in range(12)]
    alone = {}
    for one in asked:
        alone |= served(engine_of(model, small, steps), one)
    tight = replace(LIMITS, num_pages=28)
    engine = Engine(Runner(model, steps), tight, masks=Grammars(-(-TOKENIZER.vocab_size // 32)))
    together = served(engine, *asked)
    assert engine.scheduler.preemptions > 0
    for key, events in together.items():
        assert ids(events) == ids(alone[key])


def test_the_plain_loop_gives_the_same_answers(
    model: Transformer, steps: Steps, guide: Guide, person: Form
) -> None:
    """Cold, hot, with logprobs, with penalties, cut, and with a form that begins later."""
    trigger = TOKENIZER.encode("(")[-1]
    later = regex(guide, r"\([0-9]{3}\)", begins_after=trigger)
    cases = [
        (person, SamplingParams(temperature=0.0), 120),
        (person, SamplingParams(temperature=1.5, seed=3), 120),
        (person, SamplingParams(temperature=1.5, seed=4, top_logprobs=2), 120),
        (person, SamplingParams(temperature=1.0, seed=5, frequency_penalty=1.0), 120),
        (person, SamplingParams(temperature=1.0, seed=6), 12),
        (later, SamplingParams(temperature=1.0, seed=7, logit_bias={trigger: 4.0}), 120),
    ]
    asked = [
        request(str(i), form, sampling=sampling, max_tokens=size)
        for i, (form, sampling, size) in enumerate(cases)
    ]
    events = served(engine_of(model, LIMITS, steps), *asked)
    for one, (form, sampling, size) in zip(asked, cases, strict=True):
        draws = generate_draws(
            model,
            one.prompt_ids,
            sampling,
            max_tokens=size,
            eos_ids=TOKENIZER.eos_ids,
            form=form,
        )
        assert [draw.token_id for draw in draws] == ids(events[one.id, 0]), one.id


def test_the_library_answers_in_a_schema_or_an_expression(model: Transformer) -> None:
    hot = {"temperature": 1.5, "seed": 1, "max_tokens": 120}
    for schema in SCHEMA, json.dumps(SCHEMA):
        answer = "".join(generate(model, TOKENIZER, "Hello", json_schema=schema, **hot))
        assert is_person(answer)
    answer = "".join(generate(model, TOKENIZER, "Hello", regex="[ab]{3}c", ignore_eos=True, **hot))
    assert re.fullmatch("[ab]{3}c", answer)
    with pytest.raises(StructureError, match="give one of them"):
        generate(model, TOKENIZER, "Hello", json_schema=SCHEMA, regex="a")
    with pytest.raises(StructureError):
        generate(model, TOKENIZER, "Hello", regex="(a")
    different = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    with pytest.raises(StructureError, match="/uniqueItems: not enforced"):
        generate(model, TOKENIZER, "Hello", json_schema=different)


def test_a_cut_answer_says_so(model: Transformer, steps: Steps, person: Form) -> None:
    """Also where the cut is among forced tokens: {"name":" has 9 of them."""
    for max_tokens in 4, 9, 10, 15:
        events = served(
            engine_of(model, LIMITS, steps), request("A", person, max_tokens=max_tokens)
        )["A", 0]
        assert len(ids(events)) == max_tokens
        assert events[-1].finish_reason is FinishReason.LENGTH
