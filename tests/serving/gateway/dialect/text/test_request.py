"""Text completions: prompts in all their forms, and what they mean in the proto."""

import json
from typing import Any

import pytest

from serving.errors import InvalidParameter, InvalidRequest, UnsupportedParameter
from serving.gateway.dialect.openai import check_unknown
from serving.gateway.dialect.parsing import read
from serving.gateway.dialect.text.request import CompletionRequest
from serving.proto import inference_pb2


def asked(
    model: inference_pb2.SamplingParams | None = None, **body: Any
) -> list[inference_pb2.GenerateRequest]:
    """The calls of a request to a model with these sampling parameters of its own."""
    request = read(json.dumps(body).encode(), CompletionRequest, check_unknown)
    calls = request.protos()
    request.fill_in(calls, model or inference_pb2.SamplingParams())
    return calls


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a"], ["a"]),
        (["a", "b"], ["a", "b"]),
        ([5, 7], [[5, 7]]),
        ([[5, 7], [9]], [[5, 7], [9]]),
        (["a", [9]], ["a", [9]]),
    ],
)
def test_prompts(prompt: object, prompts: list[object]) -> None:
    said = [
        each.text if each.WhichOneof("prompt") == "text" else list(each.token_ids.ids)
        for each in asked(prompt=prompt)
    ]
    assert said == prompts


@pytest.mark.parametrize(
    "prompt", [None, 5, {}, [], [[]], [None], ["a", 5], [-1], [[5, "a"]], ["a"] * 2049, [1.5]]
)
def test_prompts_that_are_none(prompt: object) -> None:
    with pytest.raises(InvalidParameter):
        asked(prompt=prompt)


def test_a_wrong_id_is_one_problem() -> None:
    with pytest.raises(InvalidParameter, match="greater than or equal to 0") as refused:
        asked(prompt=[[1, 2], [3, -4]])
    (problem,) = refused.value.problems
    assert problem.path == ("body", "prompt", "1", "1")


def test_prompts_and_choices_are_bounded_together() -> None:
    assert len(asked(prompt=["a"] * 1024, n=2)) == 1024
    with pytest.raises(InvalidParameter, match="2,?050 choices together; ask for at most 2,?048"):
        asked(prompt=["a"] * 1025, n=2)


@pytest.mark.parametrize(("prompt", "n"), [("a" * 2**20, 4), ([1] * 2**17, 8)])
def test_the_prompt_that_the_choices_of_a_stream_repeat_is_bounded(prompt: object, n: int) -> None:
    body = {"prompt": prompt, "echo": True}
    assert asked(**body, n=n, stream=True)[0].return_prompt_pieces
    assert asked(**body, n=n + 1)[0].return_prompt_pieces
    with pytest.raises(InvalidParameter, match="a stream would repeat about"):
        asked(**body, n=n + 1, stream=True)


def test_of_several_prompts_each_call_is_short_until_it_is_sent() -> None:
    """What they share may have 256 KB, and is not held 2,048 times."""
    schema = {"type": "object", "description": "x" * 100_000}
    body = {"prompt": ["a", [5]], "guided_json": schema, "stop": ["x"], "n": 2, "seed": 3}
    request = read(json.dumps(body).encode(), CompletionRequest, check_unknown)
    calls = request.protos()
    request.fill_in(calls, inference_pb2.SamplingParams())
    assert all(call.ByteSize() < 50 for call in calls)
    whole = [request.complete(call) for call in calls]
    alone = [
        asked(**(body | {"prompt": [prompt]}))
        for prompt in ("a", [5])  # type: ignore[arg-type]
    ]
    assert [[call] for call in whole] == alone


def test_openais_defaults() -> None:
    (request,) = asked(prompt="a")
    assert request == inference_pb2.GenerateRequest(
        text="a", max_tokens=16, sampling=inference_pb2.SamplingParams(temperature=1)
    )
    assert asked(prompt="a", max_tokens=None, temperature=None, logprobs=None, echo=False) == [
        request
    ]


def test_a_models_own_temperature_comes_before_openais() -> None:
    own = inference_pb2.SamplingParams(temperature=0.2)
    (silent,) = asked(own, prompt="a")
    assert not silent.sampling.HasField("temperature")  # the service fills it in
    (given,) = asked(own, prompt="a", temperature=0.5)
    assert given.sampling.temperature == 0.5
    (other,) = asked(inference_pb2.SamplingParams(top_p=0.9), prompt="a")
    assert other.sampling.temperature == 1


def test_every_parameter_arrives() -> None:
    (request,) = asked(
        prompt="a", max_tokens="7", temperature=0, logprobs=0, n=2, stop="x", seed=4, best_of=2
    )
    assert request == inference_pb2.GenerateRequest(
        text="a",
        max_tokens=7,
        n=2,
        stop=["x"],
        top_logprobs=0,
        sampling=inference_pb2.SamplingParams(temperature=0, seed=4),
    )


@pytest.mark.parametrize(("n", "best_of"), [({}, 2), ({"n": 2}, 3), ({"n": 2}, 1), ({}, 0)])
def test_best_of_is_the_number_of_choices(n: dict[str, int], best_of: int) -> None:
    with pytest.raises(UnsupportedParameter, match="best_of is not supported") as caught:
        asked(prompt="a", **n, best_of=best_of)
    assert caught.value.problems[0].path == ("body", "best_of")
    choices = n.get("n", 1)
    assert asked(prompt="a", **n, best_of=choices) == asked(prompt="a", **n)


@pytest.mark.parametrize("parameter", ["suffix", "best_of"])
def test_features_we_do_not_have_are_named(parameter: str) -> None:
    value = {"suffix": "b", "best_of": 2}[parameter]
    with pytest.raises(UnsupportedParameter, match=f"{parameter} is not supported"):
        asked(prompt="a", **{parameter: value})


def test_mistakes() -> None:
    with pytest.raises(InvalidParameter, match="Field required"):
        asked(max_tokens=5)
    with pytest.raises(InvalidParameter):
        asked(prompt="a", logprobs=21)
    with pytest.raises(InvalidRequest, match="the key 'prompt'"):
        read(b"[]", CompletionRequest, check_unknown)
