"""Requests, events and errors arrive in another process as they were sent."""

import time

import pytest

from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.structure.specification import Kind, Specification
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from serving.errors import ContextTooLong, InvalidParameter, Overloaded, ServingError, Unavailable
from serving.proto import texts_pb2 as pb
from serving.scheduling.request import (
    NO_LIMIT,
    Drawn,
    Event,
    FinishReason,
    Priority,
    Request,
    TokenScore,
)
from serving.texts.codec import (
    CodecError,
    error_message,
    error_of,
    events_message,
    events_of,
    request_of,
    submit_message,
)

# No value is that of a default.
WHOLE = Request(
    id="a1",
    prompt_ids=(3, 1, 4, 2**31 - 1),
    sampling=SamplingParams(
        temperature=0.1,
        top_p=0.7,
        top_k=5,
        min_p=0.01,
        presence_penalty=0.3,
        frequency_penalty=-0.2,
        repetition_penalty=1.1,
        logit_bias={7: -100.0, 3: 2.5},
        seed=9,
        top_logprobs=4,
    ),
    max_tokens=NO_LIMIT,
    eos_ids=frozenset({2, 5}),
    min_tokens=3,
    n=2,
    deadline=time.monotonic() + 1 / 3,
    caller="bob",
    adapter="mine",
    salt=b"\x00salt",
    priority=Priority.BATCH,
    suspect=True,
    prompt_logprobs=0,
    allowed_ids=frozenset({8, 1}),
    prediction_ids=(6, 2, 6),
)
PLAIN = Request(
    id="a2", prompt_ids=(1,), sampling=SamplingParams(), max_tokens=1, eos_ids=frozenset()
)
EVENTS = [
    Event(request_id="a1", choice=1, drawn=None, finish_reason=None, computed=3, cached=2),
    Event(
        request_id="a1",
        choice=0,
        drawn=Drawn(token_id=0, logprob=-0.1, top_logprobs=((0, -0.1), (9, -3.25))),
        finish_reason=None,
        computed=4,
        seated=12.1,
        steps=7,
        prompt_logprobs=(
            TokenScore(token_id=4, logprob=-1 / 3, rank=2, top_logprobs=((1, -0.5), (4, -1 / 3))),
            TokenScore(token_id=5, logprob=-2.0, rank=1),
        ),
    ),
    Event(
        request_id="a2",
        choice=0,
        drawn=Drawn(token_id=70_000, forced=True),
        finish_reason=FinishReason.STOP,
    ),
    Event(
        request_id="a1",
        choice=1,
        drawn=Drawn(token_id=1, logprob=0.0, accepted=True, rejected=15),
        finish_reason=FinishReason.LENGTH,
    ),
]
NUMBERS = {"a1": 1, "a2": 2}
IDS = {number: name for name, number in NUMBERS.items()}


@pytest.mark.parametrize("request_", [WHOLE, PLAIN])
def test_a_request_arrives_in_every_field(request_: Request) -> None:
    data = submit_message(request_, 7).SerializeToString()
    message = pb.Submit.FromString(data)
    assert request_of(message) == request_
    assert message.number == 7 and not message.HasField("form")


def test_a_form_goes_as_its_grammar() -> None:
    tokenizer = ByteTokenizer()
    with Compiler(tokenizer, tokenizer.vocab_size, processes=0) as compiler:
        wanted = Specification(Kind.CHOICE, choices=("yes", "no"))
        form = compiler.compile(wanted, continues=True, salt=b"")
    held = Request(**{**vars(PLAIN), "form": form})
    message = submit_message(held, 1)
    assert message.form.grammar == form.grammar != ""
    assert not message.form.HasField("begins_after")


def test_events_arrive_in_their_order_and_in_every_field() -> None:
    data = events_message(EVENTS, NUMBERS.__getitem__).SerializeToString()
    arrived = list(events_of(pb.Events.FromString(data), IDS.__getitem__))
    assert [number for number, _ in arrived] == [1, 1, 2, 1]
    for (_, event), sent in zip(arrived, EVENTS, strict=True):
        assert event == sent
        assert (event.seated, event.steps) == (sent.seated, sent.steps)
        if event.drawn is not None and sent.drawn is not None:
            got, want = event.drawn, sent.drawn
            assert (got.accepted, got.rejected) == (want.accepted, want.rejected)


def test_columns_that_do_not_agree_are_refused() -> None:
    message = events_message(EVENTS, NUMBERS.__getitem__)
    del message.steps[0]
    with pytest.raises(CodecError, match="columns"):
        list(events_of(message, IDS.__getitem__))


def test_what_no_text_process_sends_is_refused() -> None:
    message = submit_message(PLAIN, 1)
    message.priority = 9
    with pytest.raises(CodecError):
        request_of(message)
    message = submit_message(PLAIN, 1)
    message.sampling.temperature = -1.0
    with pytest.raises(CodecError):
        request_of(message)


@pytest.mark.parametrize(
    "error",
    [
        Unavailable("gone"),
        InvalidParameter("n is wrong"),
        ContextTooLong("too long"),
        Overloaded("full", 1.25),
    ],
)
def test_an_error_keeps_its_kind_and_its_seconds(error: ServingError) -> None:
    arrived = error_of(pb.Error.FromString(error_message(error).SerializeToString()))
    assert type(arrived) is type(error) and str(arrived) == str(error)
    assert arrived.retry_after_ms == error.retry_after_ms
