"""The body of a chat: what is taken, what it means in the proto, what is refused and how."""

import json
from typing import Any

import pytest

from serving.errors import InvalidParameter, InvalidRequest, UnsupportedParameter
from serving.gateway.dialect.chat.request import ChatRequest
from serving.gateway.dialect.openai import check_unknown
from serving.gateway.dialect.parsing import read
from serving.proto import inference_pb2
from tests.support.chats import HELLO, PASS, REFUSE, asked


def test_what_is_left_out_stays_absent() -> None:
    request = asked()
    assert request == inference_pb2.GenerateRequest(
        chat=inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="hello")]),
        sampling=inference_pb2.SamplingParams(),
    )
    assert not request.HasField("max_tokens")
    assert not request.sampling.HasField("temperature")


def test_every_parameter_arrives() -> None:
    request = asked(temperature=0, top_p=0.5, max_tokens=7, seed=-3, stop=["a", "b"], model="any")
    assert request.sampling == inference_pb2.SamplingParams(temperature=0, top_p=0.5, seed=-3)
    assert request.sampling.HasField("temperature")
    assert request.max_tokens == 7
    assert request.stop == ["a", "b"]


def test_every_extra_arrives() -> None:
    asked_for = {
        "n": 3,
        "logprobs": True,
        "top_logprobs": 2,
        "logit_bias": {"5": -100, "7": 0.5},
        "top_k": 40,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [5, 7],
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "prediction": {"type": "content", "content": [{"type": "text", "text": "a b"}]},
    }
    expected = inference_pb2.GenerateRequest(
        chat=asked().chat,
        sampling=inference_pb2.SamplingParams(
            top_k=40,
            min_p=0.25,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            repetition_penalty=1.5,
            logit_bias={5: -100, 7: 0.5},
        ),
        n=3,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[5, 7],
        top_logprobs=2,
        prediction="a b",
    )
    for unknown in (PASS, check_unknown):
        assert asked(unknown, **asked_for) == expected
    with pytest.raises(InvalidRequest, match="Extra parameters"):
        asked(**asked_for)
    assert asked(check_unknown, logprobs=1).top_logprobs == 0
    assert asked(check_unknown, logprobs=1).HasField("top_logprobs")
    assert not asked().sampling.HasField("top_k")  # so that the model's own value holds
    for everything in (-1, 0):  # vLLM's ways to say all
        assert asked(check_unknown, top_k=everything).sampling.HasField("top_k")
        assert asked(check_unknown, top_k=everything).sampling.top_k == 0


def test_the_names_of_other_dialects() -> None:
    request = asked(max_completion_tokens=7, random_seed=5)
    assert (request.max_tokens, request.sampling.seed) == (7, 5)
    request = asked(max_tokens=None, max_completion_tokens=7, seed=4, random_seed=5)
    assert (request.max_tokens, request.sampling.seed) == (7, 4)


def test_strings_stand_for_numbers_and_booleans() -> None:
    chat = read(
        json.dumps(
            {
                "messages": HELLO,
                "stream": "True",
                "temperature": "0.5",
                "max_tokens": "7",
                "seed": "9",
                "presence_penalty": "0",
            }
        ).encode(),
        ChatRequest,
        REFUSE,
    )
    assert chat.stream is True
    (request,) = chat.protos()
    assert (request.sampling.temperature, request.max_tokens, request.sampling.seed) == (0.5, 7, 9)


def test_null_means_absent_everywhere() -> None:
    names = "model temperature top_p max_tokens max_completion_tokens stop seed random_seed stream"
    names += " stream_options presence_penalty frequency_penalty response_format tools tool_choice"
    names += " modalities"
    assert asked(REFUSE, **dict.fromkeys(names.split())) == asked()
    extras = "n logprobs top_logprobs logit_bias safe_prompt top_k min_p repetition_penalty"
    extras += " min_tokens ignore_eos stop_token_ids allowed_token_ids include_stop_str_in_output"
    assert asked(PASS, **dict.fromkeys(extras.split())) == asked()


def test_features_that_are_not_asked_for() -> None:
    assert asked(
        tools=[],
        tool_choice="auto",
        modalities=["text"],
        response_format={"type": "text"},
        stream=True,
        stream_options={"include_usage": False},
    ) == asked(response_format={"type": {"type": "text"}})
    harmless = {"logprobs": 0, "top_logprobs": 0, "logit_bias": {}, "safe_prompt": False}
    assert asked(PASS, **harmless) == asked()
    assert asked(check_unknown, stream=False, stream_options={}) == asked()
    calls: dict[str, Any] = {"functions": [], "function_call": "none", "audio": None}
    assert asked(check_unknown, **calls) == asked()


@pytest.mark.parametrize(
    ("stop", "texts"),
    [("a", ["a"]), (["a"], ["a"]), ([], []), ("", []), (["", "a"], ["a"]), (list("abcde"),) * 2],
)
def test_stop(stop: object, texts: list[str]) -> None:
    assert asked(stop=stop).stop == texts


@pytest.mark.parametrize(
    ("parameters", "path"),
    [
        ({"messages": []}, "body.messages"),
        ({"messages": None}, "body.messages"),
        ({"messages": "hello"}, "body.messages"),
        ({"messages": ["hello"]}, "body.messages.0"),
        ({"messages": [{"content": "a"}]}, "body.messages.0.role"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "body.messages.0.role"),
        ({"messages": HELLO * 2049}, "body.messages"),
        ({"messages": [{"role": "user", "content": "a", "prefix": True}]}, "body.messages"),
        (
            {"messages": [{"role": "assistant", "prefix": True}, *HELLO]},
            "body.messages",
        ),
        ({"safe_prompt": "perhaps"}, "body.safe_prompt"),
        ({"messages": [{"role": "user"}]}, "body.messages.0.content"),
        ({"messages": [{"role": "system", "content": None}]}, "body.messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "body.messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "body.messages.0.content",
        ),
        ({"temperature": -0.1}, "body.temperature"),
        ({"temperature": 2.1}, "body.temperature"),
        ({"temperature": "warm"}, "body.temperature"),
        ({"top_p": 1.1}, "body.top_p"),
        ({"max_tokens": -1}, "body.max_tokens"),
        ({"max_tokens": 1.5}, "body.max_tokens"),
        ({"max_tokens": 2**31}, "body.max_tokens"),
        ({"seed": 2**63}, "body.seed"),
        ({"stop": 5}, "body.stop"),
        ({"stop": ["a", 5]}, "body.stop.1"),
        ({"stream": "perhaps"}, "body.stream"),
        ({"presence_penalty": 4.567}, "body.presence_penalty"),
        ({"response_format": {}}, "body.response_format.type"),
        ({"frequency_penalty": "heavy"}, "body.frequency_penalty"),
        ({"n": 0}, "body.n"),
        ({"n": 129}, "body.n"),
        ({"logprobs": 7}, "body.logprobs"),
        ({"top_logprobs": 5}, "body.top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "body.top_logprobs"),
        ({"logit_bias": {"5": -101}}, "body.logit_bias.5"),
        ({"logit_bias": {"-1": 0}}, "body.logit_bias.-1.[key]"),
        ({"logit_bias": {str(i): 0 for i in range(301)}}, "body.logit_bias"),
        ({"top_k": -2}, "body.top_k"),
        ({"min_p": 1.1}, "body.min_p"),
        ({"repetition_penalty": 0}, "body.repetition_penalty"),
        ({"min_tokens": -1}, "body.min_tokens"),
        ({"ignore_eos": "perhaps"}, "body.ignore_eos"),
        ({"stop_token_ids": [-1]}, "body.stop_token_ids.0"),
        ({"prediction": "a"}, "body.prediction"),
        ({"prediction": {"type": "content"}}, "body.prediction.content"),
        ({"prediction": {"type": "file", "content": "a"}}, "body.prediction.type"),
    ],
)
def test_mistakes_are_named(parameters: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        asked(PASS, **parameters)
    assert type(caught.value) is InvalidParameter
    assert [".".join(problem.path) for problem in caught.value.problems] == [path]


@pytest.mark.parametrize(
    ("parameters", "path"),
    [
        ({"modalities": ["text", "audio"]}, "body.modalities"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "body.messages.0.content",
        ),
        ({"messages": [{"role": "function", "content": "a"}]}, "body.messages.0.role"),
        (
            {"messages": [{"role": "assistant", "function_call": {"name": "f"}}]},
            "body.messages.0.function_call",
        ),
        ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "body.messages.0.audio"),
        ({"functions": [{"name": "f"}]}, "body.functions"),
        ({"function_call": {"name": "f"}}, "body.function_call"),
        ({"audio": {"voice": "a"}}, "body.audio"),
        ({"structural_tag": {}}, "body.structural_tag"),
    ],
)
def test_features_we_do_not_have_are_named(parameters: dict[str, Any], path: str) -> None:
    for unknown in (PASS, check_unknown):
        with pytest.raises(UnsupportedParameter) as caught:
            asked(unknown, **parameters)
        assert [".".join(problem.path) for problem in caught.value.problems] == [path]
