"""Bodies of requests: what is taken, what it means in the proto, what is refused and how."""

import json
from typing import Any

import pytest

from serving.errors import InvalidParameter, InvalidRequest, UnsupportedParameter
from serving.gateway.dialect.azure import ExtraParameters
from serving.gateway.dialect.chat.messages import SAFETY_PROMPT
from serving.gateway.dialect.chat.request import ChatRequest
from serving.gateway.dialect.openai import ignore_unknown
from serving.gateway.dialect.parsing import MAX_PROBLEMS, UnknownFields, read
from serving.proto import inference_pb2

HELLO = [{"role": "user", "content": "hello"}]


REFUSE = ExtraParameters.REFUSE.apply
DROP = ExtraParameters.DROP.apply
PASS = ExtraParameters.PASS.apply


def asked(unknown: UnknownFields = REFUSE, **parameters: Any) -> inference_pb2.GenerateRequest:
    body = json.dumps({"messages": HELLO} | parameters).encode()
    (request,) = read(body, ChatRequest, unknown).protos()
    return request


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
    )
    for unknown in (PASS, ignore_unknown):
        assert asked(unknown, **asked_for) == expected
    with pytest.raises(InvalidRequest, match="Extra parameters"):
        asked(**asked_for)
    assert asked(ignore_unknown, logprobs=1).top_logprobs == 0
    assert asked(ignore_unknown, logprobs=1).HasField("top_logprobs")
    assert asked(ignore_unknown, top_k=-1) == asked()  # vLLM's way to say all


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
    extras += " min_tokens ignore_eos stop_token_ids"
    assert asked(PASS, **dict.fromkeys(extras.split())) == asked()


def test_features_that_are_not_asked_for() -> None:
    assert asked(
        tools=[],
        tool_choice="auto",
        modalities=["text"],
        response_format={"type": "text"},
        stream_options={"include_usage": False},
    ) == asked(response_format={"type": {"type": "text"}})
    harmless = {"logprobs": 0, "top_logprobs": 0, "logit_bias": {}, "safe_prompt": False}
    assert asked(PASS, **harmless) == asked()
    calls: dict[str, Any] = {"functions": [], "function_call": "none", "audio": None}
    assert asked(ignore_unknown, **calls) == asked()


def test_what_the_linked_notebooks_send_unasked_needs_no_header() -> None:
    request = asked(safe_prompt=False, random_seed=3, max_completion_tokens=5, stream_options={})
    assert (request.sampling.seed, request.max_tokens) == (3, 5)


def test_a_safe_prompt_begins_with_mistrals_own() -> None:
    def said(**parameters: Any) -> list[tuple[str, str]]:
        chat = asked(safe_prompt=True, **parameters).chat
        return [(message.role, message.content) for message in chat.messages]

    assert SAFETY_PROMPT.startswith("Always assist with care, respect, and truth.")
    assert said() == [("system", SAFETY_PROMPT), ("user", "hello")]
    with_system = [{"role": "system", "content": "be brief"}, *HELLO]
    assert said(messages=with_system) == [
        ("system", f"{SAFETY_PROMPT}\n\nbe brief"),
        ("user", "hello"),
    ]


def test_a_prefix_is_the_beginning_of_the_answer() -> None:
    begun = {"role": "assistant", "content": "Once", "prefix": True}
    chat = asked(messages=[*HELLO, begun]).chat
    assert chat.continue_last
    assert chat.messages[-1].content == "Once"
    assert not asked(messages=[*HELLO, begun | {"prefix": False}]).chat.continue_last


def test_messages_may_carry_what_clients_keep_in_them() -> None:
    """A delta that was stored as it came, and what LangChain and .NET add."""
    stored = {"role": "assistant", "content": None, "tool_calls": [], "index": 0, "name": None}
    request = asked(messages=[*HELLO, stored, {"role": "user", "content": "b", "wine": "red"}])
    assert [message.content for message in request.chat.messages] == ["hello", "", "b"]


def test_what_a_refusal_shows_of_the_request_is_bounded() -> None:
    long = "x" * 10_000
    with pytest.raises(InvalidRequest) as refused:
        asked(**{f"{long}{i}": 1 for i in range(100)})
    assert len(str(refused.value)) < 5_000
    for parameters in (
        {"messages": [{"role": "wizard", "content": "a"}] * 1_000},
        {"logit_bias": {f"{long}{i}": 0 for i in range(100)}},
    ):
        with pytest.raises(InvalidParameter) as caught:
            asked(ignore_unknown, **parameters)
        assert len(caught.value.problems) == MAX_PROBLEMS
        assert sum(len(step) for each in caught.value.problems for step in each.path) < 2_000


@pytest.mark.parametrize(
    ("stop", "texts"),
    [("a", ["a"]), (["a"], ["a"]), ([], []), ("", []), (["", "a"], ["a"]), (list("abcde"),) * 2],
)
def test_stop(stop: object, texts: list[str]) -> None:
    assert asked(stop=stop).stop == texts


def test_roles_and_contents() -> None:
    request = asked(
        messages=[
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "name": None,
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "tool_calls": None},
            {"role": "system", "content": ""},
        ]
    )
    said = [(message.role, message.content) for message in request.chat.messages]
    assert said == [("system", "be brief"), ("user", "a\nb"), ("assistant", ""), ("system", "")]


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
        ({"response_format": {}}, "body.response_format"),
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
        ({"response_format": {"type": "json_object"}}, "body.response_format"),
        ({"response_format": {"type": {"type": "json_object"}}}, "body.response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "body.response_format"),
        ({"tools": [{"type": "function"}]}, "body.tools"),
        ({"tool_choice": "required"}, "body.tool_choice"),
        ({"modalities": ["text", "audio"]}, "body.modalities"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "body.messages.0.content",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
            "body.messages.0.tool_calls",
        ),
        ({"messages": [{"role": "tool", "content": "a"}]}, "body.messages.0.role"),
        ({"functions": [{"name": "f"}]}, "body.functions"),
        ({"function_call": {"name": "f"}}, "body.function_call"),
        ({"audio": {"voice": "a"}}, "body.audio"),
        ({"guided_json": {}}, "body.guided_json"),
    ],
)
def test_features_we_do_not_have_are_named(parameters: dict[str, Any], path: str) -> None:
    for unknown in (PASS, ignore_unknown):
        with pytest.raises(UnsupportedParameter) as caught:
            asked(unknown, **parameters)
        assert [".".join(problem.path) for problem in caught.value.problems] == [path]


def test_a_mistake_beside_a_missing_feature_is_a_mistake() -> None:
    with pytest.raises(InvalidParameter) as caught:
        asked(tools=[{}], top_p=2)
    assert type(caught.value) is InvalidParameter
    assert {problem.path for problem in caught.value.problems} == {
        ("body", "top_p"),
        ("body", "tools"),
    }


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"hello"',
        b"null",
        b"\xff",
        b'{"messages": NaN}',
        b'{"messages": "\\ud800"}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_json_object_is_malformed(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(body, ChatRequest, ignore_unknown)
    assert type(caught.value) is InvalidRequest


def test_extras_are_refused_in_microsofts_words() -> None:
    with pytest.raises(InvalidRequest) as caught:
        asked(wine="red", n=1, temperature=99)
    assert type(caught.value) is InvalidRequest
    assert str(caught.value) == (
        "Extra parameters ['wine', 'n'] are not allowed when extra-parameters is not set or set to"
        " be 'error'. Set extra-parameters to 'pass-through' to pass to the model."
    )


def test_extras_that_nobody_knows_are_dropped_ignored_or_forbidden() -> None:
    assert asked(DROP, wine="red", n=2) == asked()
    assert asked(ignore_unknown, wine="red") == asked()
    with pytest.raises(InvalidParameter) as caught:
        asked(PASS, wine="red", logprobs=True)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.path, problem.message, problem.value) == (
        "extra_forbidden",
        ("body", "wine"),
        "Extra inputs are not permitted",
        "red",
    )


@pytest.mark.parametrize(
    ("header", "policy"),
    [
        (None, ExtraParameters.REFUSE),
        ("", ExtraParameters.REFUSE),
        ("error", ExtraParameters.REFUSE),
        ("drop", ExtraParameters.DROP),
        ("ignore", ExtraParameters.DROP),
        ("pass-through", ExtraParameters.PASS),
        ("Pass-Through", ExtraParameters.PASS),
        ("allow", ExtraParameters.PASS),
    ],
)
def test_the_header_decides(header: str | None, policy: ExtraParameters) -> None:
    assert ExtraParameters.from_header(header) is policy


@pytest.mark.parametrize("header", ["lenient", "passthrough", "true"])
def test_a_header_that_says_nothing_known_is_malformed(header: str) -> None:
    with pytest.raises(InvalidRequest, match="extra-parameters") as caught:
        ExtraParameters.from_header(header)
    # LiteLLM takes the first bracket of a body for the list of parameters.
    assert "[" not in str(caught.value)
