"""OpenAI's Responses API through the gateway, as openai's own client asks it."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.support.fakes import KEY, Stack, running_stack
from tests.support.gateway import BEARER


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{stack.url}/v1",
        api_key=KEY,
        max_retries=0,
        _strict_response_validation=True,  # pydantic checks every field of an answer
    ) as client:
        yield client


def test_an_answer_at_once(stack: Stack, client: openai.OpenAI) -> None:
    stack.service.cached_tokens = 1
    answer = client.responses.create(model="azureai", input="one two", instructions="be brief")
    stack.service.cached_tokens = 0
    assert (answer.output_text, answer.status, answer.model) == (
        "one two",
        "completed",
        "scripted-7B",
    )
    assert answer.id.startswith("resp_") and answer.id.removeprefix("resp_").isalnum()
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (2, 2)
    assert answer.usage.input_tokens_details.cached_tokens == 1
    assert answer.model_extra == {"store": False}
    (asked,) = stack.service.requests
    assert [message.role for message in asked.chat.messages] == ["system", "user"]


def test_a_cut_answer(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="azureai", input="one two three", max_output_tokens=2)
    assert (answer.output_text, answer.status) == ("one two", "incomplete")
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"


def test_a_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model="azureai", input="one two") as stream:
        events = list(stream)
        answer = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(10))
    assert events[-1].type == "response.completed"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == answer.output_text == "one two"
    last = list(
        client.responses.create(model="azureai", input="a b", max_output_tokens=1, stream=True)
    )
    assert last[-1].type == "response.incomplete"


def test_heartbeats_are_no_events_of_the_client() -> None:
    with running_stack(heartbeat_seconds=0.05) as stack:
        body = {"input": "!open !wait one", "stream": True}
        with (
            httpx.Client(base_url=stack.url, headers=BEARER) as plain,
            plain.stream("POST", "/v1/responses", json=body) as answer,
        ):
            lines = answer.iter_lines()
            assert ": heartbeat" in lines
            stack.service.release()
            assert list(lines)[-2].startswith('data: {"type":"response.completed"')
        stack.service.reset()
        with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=KEY) as client:
            stream = client.responses.create(model="azureai", input="!open !wait one", stream=True)
            types = [next(stream).type, next(stream).type]
            stack.loop.call_soon_threadsafe(stack.loop.call_later, 0.2, stack.service.release)
            types += [event.type for event in stream]
    assert types[:2] == ["response.created", "response.in_progress"]
    assert len(types) == 9 and types[-1] == "response.completed"


def test_a_failure_in_the_middle(client: openai.OpenAI) -> None:
    stream = client.responses.create(model="azureai", input="one !fail:EngineFailure", stream=True)
    types = []
    with pytest.raises(httpx.RemoteProtocolError):
        for event in stream:
            types.append(event.type)
            if event.type == "response.failed":
                assert event.response.error is not None
                assert event.response.error.code == "server_error"
                assert event.response.error.message == "EngineFailure was asked for"
    assert types[-1] == "response.failed"


def test_a_failure_before_the_first_event_is_a_status(client: openai.OpenAI) -> None:
    with pytest.raises(openai.RateLimitError):
        client.responses.create(model="azureai", input="!fail:Overloaded", stream=True)


@pytest.mark.parametrize(
    ("refused", "param", "code"),
    [
        ({"store": True}, "store", "unsupported_parameter"),
        ({"wine": "red"}, "wine", "unknown_parameter"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing_required_parameter"),
        ({"input": ["x"]}, "input[0]", "invalid_type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content",
            "unsupported_parameter",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "unsupported_parameter"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format", "invalid_value"),
    ],
)
@pytest.mark.parametrize("path", ["/responses", "/openai/responses", "/v1/responses"])
def test_a_refusal_has_openais_shape(
    stack: Stack, path: str, refused: dict[str, Any], param: str, code: str
) -> None:
    with httpx.Client(base_url=stack.url, headers=BEARER) as client:
        answer = client.post(path, json={"input": "one"} | refused)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


def test_too_long_an_input_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.responses.create(model="azureai", input="!fail:ContextTooLong")
    assert (raised.value.param, raised.value.code) == ("input", "context_length_exceeded")


def test_azure_openais_client(stack: Stack) -> None:
    with openai.AzureOpenAI(
        azure_endpoint=stack.url, api_key=KEY, api_version="2025-04-01-preview", max_retries=0
    ) as client:
        assert client.responses.create(model="azureai", input="one two").output_text == "one two"
    with openai.AzureOpenAI(
        azure_endpoint=stack.url,
        azure_deployment="any",
        api_key=KEY,
        api_version="preview",
        max_retries=0,
    ) as client:
        assert client.responses.create(model="azureai", input="one two").output_text == "one two"


@pytest.mark.parametrize("path", ["/responses", "/openai/v1/responses", "/v1/responses"])
def test_other_paths(stack: Stack, path: str) -> None:
    with httpx.Client(base_url=stack.url) as client:
        answer = client.post(path, headers=BEARER, json={"input": "one"})
        assert answer.json()["object"] == "response"
        assert client.post(path, json={"input": "one"}).status_code == 401


def test_hosted_tools_are_listed_where_they_are_left_out() -> None:
    tools = [{"type": "web_search"}, {"type": "function", "name": "f", "parameters": None}]
    body = {"input": "one", "tools": tools}
    with (
        running_stack(ignore_hosted_tools=True) as stack,
        httpx.Client(base_url=stack.url, headers=BEARER) as client,
    ):
        answer = client.post("/v1/responses", json=body)
        assert answer.headers["x-mixtral-ignored-tools"] == "web_search"
        assert [tool["name"] for tool in answer.json()["tools"]] == ["f"]
        with client.stream("POST", "/v1/responses", json=body | {"stream": True}) as stream:
            assert stream.headers["x-mixtral-ignored-tools"] == "web_search"
        (asked, _) = stack.service.requests
    assert [tool.name for tool in asked.chat.tools] == ["f"]


class GetWeather(BaseModel):
    """The weather in a town."""

    town: str
    unit: Literal["c", "f"]


class Person(BaseModel):
    name: str


ARGUMENTS = '{"town":"Paris","unit":"c"}'


def test_calls_and_their_results(stack: Stack, client: openai.OpenAI) -> None:
    tools: list[Any] = [openai.pydantic_function_tool(GetWeather)]
    asked: list[Any] = [{"role": "user", "content": f"weather? !call:GetWeather:{ARGUMENTS}"}]
    answer = client.responses.parse(
        model="azureai",
        input=asked,
        tools=tools,
        tool_choice={"type": "function", "name": "GetWeather"},
    )
    text, call = answer.output
    assert text.type == "message" and call.type == "function_call"
    assert call.parsed_arguments == GetWeather(town="Paris", unit="c")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"}
    given: list[Any] = [tool.to_dict() for tool in answer.tools]  # flat, as the answer repeats them
    after = client.responses.create(
        model="azureai", input=[*asked, *answer.output, result], tools=given, tool_choice="none"
    )
    assert after.output_text == "12 degrees"
    first, second = stack.service.requests
    assert first.chat.tools[0].strict and list(first.chat.tool_choice.allowed) == ["GetWeather"]
    user, assistant, tool = second.chat.messages
    assert assistant.content == "weather?" and assistant.tool_calls[0].arguments == ARGUMENTS
    assert (tool.role, tool.tool_call_id) == ("tool", assistant.tool_calls[0].id)


def test_calls_as_a_stream(client: openai.OpenAI) -> None:
    tools: list[Any] = [openai.pydantic_function_tool(GetWeather)]
    asked = f"!call:GetWeather:{ARGUMENTS} !call:GetWeather:{ARGUMENTS}"
    with client.responses.stream(model="azureai", input=asked, tools=tools) as stream:
        deltas = [
            (event.output_index, event.snapshot)
            for event in stream
            if event.type == "response.function_call_arguments.delta"
        ]
        answer = stream.get_final_response()
    assert deltas == [(0, ARGUMENTS), (1, ARGUMENTS)]
    found = [item.parsed_arguments for item in answer.output if item.type == "function_call"]
    assert found == [GetWeather(town="Paris", unit="c")] * 2


def test_a_form_of_the_text(stack: Stack, client: openai.OpenAI) -> None:
    answer = client.responses.parse(model="azureai", input='{"name":"Ada"}', text_format=Person)
    assert answer.output_parsed == Person(name="Ada")
    with client.responses.stream(
        model="azureai", input='{"name":"Ada"}', text_format=Person
    ) as stream:
        assert stream.get_final_response().output_parsed == Person(name="Ada")
    for request in stack.service.requests:
        form = request.response_format
        assert form.strict and json.loads(form.json_schema)["required"] == ["name"]


def test_parts_that_are_not_enforced_are_listed(stack: Stack) -> None:
    body = {"input": "!weak:/properties/a/not one"}
    with httpx.Client(base_url=stack.url, headers=BEARER) as client:
        answer = client.post("/v1/responses", json=body)
        assert answer.headers["x-mixtral-weakened"] == "/properties/a/not"
