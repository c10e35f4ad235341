"""Chunks of an answer, from events that are written by hand."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.structure.form import Form
from mixtral_jax.structure.matcher import Guide
from mixtral_jax.tokenization.messages import ToolCall
from mixtral_jax.tokenization.mistral import MistralTokenizer
from mixtral_jax.tokenization.tokenizer import Tokenizer
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from serving.proto import inference_pb2 as pb
from serving.proto.stop_reason import stop_reason
from serving.scheduling.request import Drawn, Event, FinishReason, Request
from serving.service.answer.choice_text import AnswerText, Stops
from serving.service.answer.form import AnswerForm
from tests.mixtral_jax.structure.test_tool_grammar import called_ids
from tests.support.tokenizers import MISTRAL_FILES
from tests.support.tools import ROME, SUM

REQUEST = Request(
    id="a",
    prompt_ids=(1,) * 90,
    sampling=SamplingParams(),
    max_tokens=3,
    eos_ids=frozenset(),
)


def event(token: int | None, computed: int, reason: FinishReason | None = None) -> Event:
    drawn = None if token is None else Drawn(token_id=token)
    return Event(
        request_id="a", choice=0, drawn=drawn, finish_reason=reason, computed=computed, cached=32
    )


def pushed(answer: AnswerText, event: Event) -> pb.GenerateChunk | None:
    """The chunk that an event adds when the next one has not come yet."""
    if event.drawn is None and event.finish_reason is None:
        return answer.progress(event)
    answer.push(event)
    return next(answer.chunks(), None)


def test_cached_tokens_are_told_before_the_end() -> None:
    """With each part of the prompt and with the first token, for whoever leaves after that."""
    tokenizer = ByteTokenizer()
    a, b, c = tokenizer.encode("abc")[-3:]
    answer = AnswerText(REQUEST, tokenizer, Stops(), continues=False)
    events = (event(None, 64), event(a, 90), event(b, 90), event(c, 90, FinishReason.LENGTH))
    chunks = [pushed(answer, each) for each in events]
    assert all(chunk is not None for chunk in chunks)
    told = [(c.computed_tokens, c.cached_tokens, c.text) for c in chunks if c is not None]
    assert told == [(64, 32, ""), (0, 32, "a"), (0, 0, "b"), (0, 0, "c")]
    last = chunks[-1]
    assert last is not None and last.usage.cached_tokens == 32


def test_guesses_are_summed_up_in_the_usage() -> None:
    tokenizer = ByteTokenizer()
    a, b = tokenizer.encode("ab")[-2:]
    answer = AnswerText(REQUEST, tokenizer, Stops(), continues=False)
    right, last = event(a, 90), event(b, 90, FinishReason.LENGTH)
    assert right.drawn is not None and last.drawn is not None
    right.drawn.accepted, last.drawn.rejected = True, 4
    (_, chunk) = [pushed(answer, taken) for taken in (right, last)]
    assert chunk is not None
    assert (chunk.usage.accepted_guesses, chunk.usage.rejected_guesses) == (1, 4)


@pytest.mark.parametrize(
    ("stops", "text", "reason"),
    [
        (Stops(("b",)), "a", "b"),
        (Stops(("b",), included=True), "ab", "b"),
        (Stops(("abc", "bc")), "", "abc"),
        (Stops(("x",), frozenset({100})), "abc", None),
    ],
)
def test_a_choice_tells_the_stop_text_that_ended_it(
    stops: Stops, text: str, reason: str | None
) -> None:
    tokenizer = ByteTokenizer()
    answer = AnswerText(REQUEST, tokenizer, stops, continues=False)
    chunks = []
    for letter in "abc":
        end = FinishReason.LENGTH if letter == "c" else None
        if not answer.has_ended:
            chunks.append(pushed(answer, event(tokenizer.encode(letter)[-1], 90, end)))
    sent = [chunk for chunk in chunks if chunk is not None]
    assert "".join(chunk.text for chunk in sent) == text
    assert stop_reason(sent[-1]) == reason
    assert all(stop_reason(chunk) is None for chunk in sent[:-1])


def test_a_choice_tells_the_stop_id_that_ended_it_but_not_the_models_own_end() -> None:
    tokenizer = ByteTokenizer()
    (eos,) = tokenizer.eos_ids
    a = tokenizer.encode("a")[-1]
    for ignore_eos, last, told in [(False, a, a), (False, eos, None), (True, eos, eos)]:
        message = pb.GenerateRequest(stop_token_ids=[a, eos], ignore_eos=ignore_eos)
        stops = Stops.of(message, tokenizer)
        answer = AnswerText(REQUEST, tokenizer, stops, continues=False)
        chunk = pushed(answer, event(last, 90, FinishReason.STOP))
        assert chunk is not None and stop_reason(chunk) == told


def held(
    text: str,
    *,
    stop: Sequence[str] = (),
    last: int | None = None,
    reason: FinishReason = FinishReason.STOP,
    violation: Callable[[str], str | None] | None = None,
) -> tuple[AnswerText, list[pb.GenerateChunk]]:
    """The chunks of an answer that is held to a form, whose last token is the model's end."""
    tokenizer = ByteTokenizer()
    form = AnswerForm(Form(Guide(tokenizer, tokenizer.vocab_size).matcher("start: /.*/")))
    answer = AnswerText(
        REQUEST,
        tokenizer,
        Stops(tuple(stop)),
        continues=False,
        form=replace(form, violation=violation),
    )
    tokens = [tokenizer.encode(letter)[-1] for letter in text]
    end = min(tokenizer.eos_ids) if last is None else last
    chunks = []
    for event_ in (*(event(token, 90) for token in tokens), event(end, 90, reason)):
        if not answer.has_ended:
            chunks.append(pushed(answer, event_))
    return answer, [chunk for chunk in chunks if chunk is not None]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({}, pb.FINISH_REASON_STOP),
        ({"stop": ["1"]}, pb.FINISH_REASON_LENGTH),
        ({"last": 100}, pb.FINISH_REASON_LENGTH),  # a stop id of the caller's
        ({"reason": FinishReason.LENGTH}, pb.FINISH_REASON_LENGTH),
    ],
    ids=["end", "stop text", "stop id", "length"],
)
def test_an_answer_with_a_form_is_whole_at_its_own_end_alone(case: Any, reason: int) -> None:
    answer, chunks = held('{"a": 1}', **case)
    assert chunks[-1].finish_reason == reason
    assert chunks[-1].usage.completion_tokens == (7 if "stop" in case else 9)


def test_a_whole_answer_is_checked_against_what_is_not_enforced() -> None:
    def wrong(text: str) -> str:
        return f"{text} is wrong"

    answer, _ = held("[1]", violation=wrong)
    assert answer.needs_check and answer.violation(0) == "[1] is wrong"
    answer, _ = held("[1]", violation=wrong, stop=["]"])
    assert answer.violation(0) is None
    answer, _ = held("[1]")
    assert not answer.needs_check and answer.violation(0) is None


V3 = MistralTokenizer(MISTRAL_FILES["v3"])
CALLS = {
    "v3": (V3, [ROME, SUM]),
    "prompt form": (ByteTokenizer(), [ROME, SUM]),
}


def calling(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    *,
    reason: FinishReason = FinishReason.STOP,
    stop: Sequence[str] = (),
    holds_text: bool = False,
    must_call: bool = False,
    call_violation: Callable[[ToolCall], str | None] | None = None,
) -> tuple[AnswerText, list[pb.GenerateChunk]]:
    """The chunks of an answer that may call tools, whose last id ends it for that reason."""
    guide = Guide(tokenizer, tokenizer.vocab_size)
    form = AnswerForm(
        Form(guide.matcher("start: /.*/")),
        call_violation=call_violation,
        holds_text=holds_text,
        may_call=True,
        must_call=must_call,
    )
    answer = AnswerText(REQUEST, tokenizer, Stops(tuple(stop)), continues=False, form=form)
    chunks = []
    for place, token in enumerate(ids):
        ends = place == len(ids) - 1
        if not answer.has_ended:
            chunks.append(pushed(answer, event(token, 90, reason if ends else None)))
    return answer, [chunk for chunk in chunks if chunk is not None]


@pytest.mark.parametrize("name", CALLS)
def test_calls_go_out_whole_one_by_one_as_they_end(name: str) -> None:
    tokenizer, calls = CALLS[name]
    ids = called_ids(tokenizer, "Rome", "sum")
    answer, chunks = calling(tokenizer, [*ids, min(tokenizer.eos_ids)])
    sent = [[(c.name, c.arguments) for c in chunk.tool_calls] for chunk in chunks]
    assert [each for each in sent if each] == [[(c["name"], c["arguments"])] for c in calls]
    assert "".join(chunk.text for chunk in chunks) == ""
    assert chunks[-1].finish_reason == pb.FINISH_REASON_TOOL_CALLS
    assert chunks[-1].usage.completion_tokens == len(ids) + 1
    assert [i for chunk in chunks for i in chunk.token_ids] == [*ids, min(tokenizer.eos_ids)]
    assert answer.reason(0) is FinishReason.STOP  # as metrics count it
    if name == "v3":
        assert [c.id for chunk in chunks for c in chunk.tool_calls] == [c["id"] for c in calls]


@pytest.mark.parametrize("name", CALLS)
def test_a_cut_within_a_call_gives_no_half_and_no_reason_to_run_it(name: str) -> None:
    tokenizer, _ = CALLS[name]
    ids = called_ids(tokenizer, "Rome")
    end = len("]</tool_call>") if name == "prompt form" else 1
    for size in range(len(tokenizer.tool_form.trigger_text) or 1, len(ids) - end, 7):
        _, chunks = calling(tokenizer, ids[:size], reason=FinishReason.LENGTH)
        assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH
        assert not any(chunk.tool_calls for chunk in chunks)
        assert "".join(chunk.text for chunk in chunks) == ""
        # The last id is one of the caller's stop ids.
        _, chunks = calling(tokenizer, ids[:size])
        assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.STOP])
def test_the_beginning_of_a_call_that_is_required_is_no_text(reason: FinishReason) -> None:
    """A model that writes calls as text was cut before that text is known to be one."""
    tokenizer, _ = CALLS["prompt form"]
    ids = called_ids(tokenizer, "Rome")
    for size in range(1, len(tokenizer.tool_form.trigger_text)):
        _, chunks = calling(tokenizer, ids[:size], reason=reason, must_call=True)
        assert "".join(chunk.text for chunk in chunks) == ""
        assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH
        _, chunks = calling(tokenizer, ids[:size], reason=reason)  # it may be any text
        assert "".join(chunk.text for chunk in chunks) == tokenizer.tool_form.trigger_text[:size]


def test_text_before_calls_is_text_and_a_stop_text_ends_it() -> None:
    text = V3.encode("I look END it up")[1:]
    ids = [*text, *called_ids(V3, "Rome"), min(V3.eos_ids)]
    _, chunks = calling(V3, ids)
    assert "".join(chunk.text for chunk in chunks) == "I look END it up"
    assert chunks[-1].finish_reason == pb.FINISH_REASON_TOOL_CALLS
    _, chunks = calling(V3, ids, stop=["END"])
    assert "".join(chunk.text for chunk in chunks) == "I look "
    assert chunks[-1].finish_reason == pb.FINISH_REASON_STOP
    _, chunks = calling(V3, ids, stop=["END"], holds_text=True)
    assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH
    # A stop text that stands in arguments is no text of the answer.
    _, chunks = calling(V3, ids, stop=["Rome"])
    assert chunks[-1].finish_reason == pb.FINISH_REASON_TOOL_CALLS


def test_text_without_calls_ends_as_text() -> None:
    ids = [*V3.encode("No, I say [TOOL_CALLS]")[1:], min(V3.eos_ids)]
    _, chunks = calling(V3, ids)
    assert "".join(chunk.text for chunk in chunks) == "No, I say [TOOL_CALLS]"
    assert chunks[-1].finish_reason == pb.FINISH_REASON_STOP
    assert not any(chunk.tool_calls for chunk in chunks)


def test_calls_are_checked_against_what_is_not_enforced() -> None:
    ids = [*called_ids(V3, "Rome", "sum"), min(V3.eos_ids)]

    def wrong(call: ToolCall) -> str | None:
        return "no sum" if call["name"] == "add" else None

    answer, _ = calling(V3, ids, call_violation=wrong)
    assert answer.needs_check and answer.violation(0) == "no sum"
    answer, _ = calling(V3, ids[:-2], call_violation=wrong, reason=FinishReason.LENGTH)
    assert answer.violation(0) is None
