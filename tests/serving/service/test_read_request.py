"""A request of the wire becomes a Request of the engine, or an error that names the field."""

from collections.abc import Sequence

import pytest

from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.tokenization.messages import Message, Tool
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from serving.errors import InvalidParameter, InvalidRequest
from serving.proto import inference_pb2 as pb
from serving.scheduling.request import Priority
from serving.service.read_request import Translator

INFO = pb.ModelInfo(max_context=512, vocab_size=261)


class OfUsersAlone(ByteTokenizer):
    """Its template renders the messages of users and nothing else."""

    def chat(
        self,
        messages: Sequence[Message],
        *,
        continue_last: bool = False,
        asks: bool = True,
        tools: Sequence[Tool] = (),
    ) -> list[int]:
        users = [message["content"] for message in messages if message["role"] == "user"]
        return [ord(letter) for letter in "".join(users)]


def asking(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2]), **fields)


def test_a_chat_that_renders_to_nothing_is_refused() -> None:
    translator = Translator(OfUsersAlone(), INFO)
    system = pb.ChatMessage(role="system", content="Be brief.")
    with pytest.raises(InvalidRequest, match="makes no text of these messages; add a message"):
        translator.request(pb.GenerateRequest(chat=pb.Chat(messages=[system])), None)
    chat = pb.Chat(messages=[system, pb.ChatMessage(role="user", content="A")])
    assert translator.request(pb.GenerateRequest(chat=chat), None).prompt_ids == (65,)


def test_absent_parameters_have_the_defaults_of_the_library() -> None:
    request = Translator(ByteTokenizer(), INFO).request(asking(), None)
    assert request.sampling == SamplingParams()
    assert request.sampling.temperature == 0.7  # azure-ai-inference's documented default


def test_absent_parameters_have_the_models_own_values_and_given_ones_win() -> None:
    own = pb.SamplingParams(
        temperature=0.25, top_p=0.5, top_k=40, min_p=0.125, repetition_penalty=1.5
    )
    info = pb.ModelInfo(max_context=512, vocab_size=261, sampling_defaults=own)
    translator = Translator(ByteTokenizer(), info)
    defaults = SamplingParams(
        temperature=0.25, top_p=0.5, top_k=40, min_p=0.125, repetition_penalty=1.5
    )
    assert translator.request(asking(), None).sampling == defaults
    given = pb.SamplingParams(temperature=0, top_p=1, top_k=0, min_p=0, repetition_penalty=1)
    assert translator.request(asking(sampling=given), None).sampling == SamplingParams(
        temperature=0.0
    )
    one = translator.request(asking(sampling=pb.SamplingParams(temperature=1)), None).sampling
    assert (one.temperature, one.top_p, one.top_k) == (1.0, 0.5, 40)


def test_present_parameters_arrive() -> None:
    sampling = pb.SamplingParams(
        temperature=0,
        top_p=0.5,
        top_k=2**32 - 1,
        min_p=0.25,
        presence_penalty=-0.5,
        frequency_penalty=0.5,
        repetition_penalty=2,
        logit_bias={9: 1.5, 4: -100},
        seed=2**40 + 3,
    )
    request = Translator(ByteTokenizer(), INFO).request(
        asking(sampling=sampling, top_logprobs=0), None
    )
    assert request.sampling == SamplingParams(
        temperature=0.0,
        top_p=0.5,
        top_k=261,  # more than the vocabulary is all of it
        min_p=0.25,
        presence_penalty=-0.5,
        frequency_penalty=0.5,
        repetition_penalty=2.0,
        logit_bias={4: -100.0, 9: 1.5},
        seed=3,
        top_logprobs=0,
    )


def test_a_prediction_is_read_where_it_is_of_use() -> None:
    """Without the token that opens a text."""
    message = asking(prediction="ab")
    assert Translator(ByteTokenizer(), INFO).request(message, None).prediction_ids == ()
    translator = Translator(ByteTokenizer(), INFO, reads_predictions=True)
    assert translator.request(message, None).prediction_ids == (97, 98)
    assert translator.request(asking(), None).prediction_ids == ()
    with pytest.raises(InvalidParameter, match="^prediction has 513 bytes; give at most 512$"):
        translator.request(asking(prediction="a" * 513), None)


def test_who_asks_arrives_in_the_request() -> None:
    fields = {"caller": "me", "cache_salt": b"s" * 32, "priority": pb.PRIORITY_BATCH}
    request = Translator(ByteTokenizer(), INFO).request(asking(suspect=True, **fields), None)
    assert (request.caller, request.salt) == ("me", b"s" * 32)
    assert (request.priority, request.suspect) == (Priority.BATCH, True)
    request = Translator(ByteTokenizer(), INFO).request(asking(), None)
    assert (request.caller, request.salt) == ("", b"")
    assert (request.priority, request.suspect) == (Priority.INTERACTIVE, False)
    for wrong, words in (
        (asking(priority=3), "priority is 3"),
        (asking(cache_salt=b"s" * 33), "33 bytes"),
    ):
        with pytest.raises(InvalidParameter, match=words):
            Translator(ByteTokenizer(), INFO).request(wrong, None)


def test_the_wrong_parameter_is_named() -> None:
    translator = Translator(ByteTokenizer(), INFO)
    with pytest.raises(InvalidParameter, match="^top_p is 1.5; it must be within 0 and 1$"):
        translator.request(asking(sampling=pb.SamplingParams(top_p=1.5)), None)
    with pytest.raises(InvalidParameter, match="^logit_bias holds 261; ids are below 261$"):
        translator.request(asking(sampling=pb.SamplingParams(logit_bias={261: 1})), None)


def test_only_small_messages_without_tools_are_read_on_the_event_loop() -> None:
    translator = Translator(ByteTokenizer(), INFO)
    assert translator.is_quick(pb.GenerateRequest(text="a" * 1000))
    assert not translator.is_quick(pb.GenerateRequest(text="a" * 1024))
    assert not translator.is_quick(asking(stop=["a" * 1024]))
    turn = pb.ChatMessage(role="user", content="a")
    chat = pb.Chat(messages=[turn])
    assert translator.is_quick(pb.GenerateRequest(chat=chat))
    chat.tools.add(name="f")
    assert not translator.is_quick(pb.GenerateRequest(chat=chat))
