"""Functions as tools of the Python client, before a service that answers by a script."""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Annotated, Any

import grpc
import pytest
from pydantic import BaseModel, Field

from serving.client import AsyncClient, Client, Gbnf, JsonSchema, Lark, OneOf, Regex, Tool
from serving.client.functions import Function
from serving.client.types import Delta, Message, ToolCall
from serving.errors import WEAKENED_METADATA
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc as rpc

ASKED: list[Message] = [{"role": "user", "content": "How is it in Rome?"}]
Mode = pb.ToolChoice.Mode


class Unit(Enum):
    """Units of temperature."""

    CELSIUS = "C"
    FAHRENHEIT = "F"


def get_weather(
    city: str,
    days: Annotated[int, Field(ge=1, le=9, description="How many days ahead")] = 1,
    unit: Unit = Unit.CELSIUS,
) -> dict[str, Any]:
    """Tells the weather of a city.

    The days begin with tomorrow.
    """
    return {"city": city, "days": days, "unit": unit}


async def wait_for_weather(city: str) -> str:
    """Tells the weather later."""
    await asyncio.sleep(0)
    return f"hot in {city}"


def fail(city: str) -> str:
    """Fails."""
    raise KeyError(city)


def call(name: str, arguments: str = "{}", call_id: str = "abcDEF123") -> ToolCall:
    return {"id": call_id, "name": name, "arguments": arguments}


ROME = call("get_weather", '{"city": "Rome", "days": 3, "unit": "F"}')


class Scripted(rpc.InferenceServicer):
    """Answers the first request by the first answer, and so on: with a text, or with calls."""

    def __init__(self) -> None:
        self.answers: list[str | list[ToolCall]] = []
        self.requests: list[Any] = []
        self.weakened = ""
        self.reason = pb.FINISH_REASON_TOOL_CALLS  # of answers that call

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateChunk]:
        self.requests.append(request)
        if self.weakened:
            context.send_initial_metadata(((WEAKENED_METADATA, self.weakened),))
        yield pb.GenerateChunk(prompt_tokens=10)
        answer = self.answers.pop(0)
        last = pb.GenerateChunk(token_ids=[2], finish_reason=pb.FINISH_REASON_STOP)
        if isinstance(answer, str):
            yield pb.GenerateChunk(text=answer, token_ids=[1])
        else:
            for each in answer:
                yield pb.GenerateChunk(token_ids=[1], tool_calls=[pb.ToolCall(**each)])
            last.finish_reason = self.reason
        last.usage.CopyFrom(pb.Usage(prompt_tokens=10, completion_tokens=2))
        yield last

    def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.Tokens:
        self.requests.append(request)
        return pb.Tokens(ids=[1], pieces=[b"a"])


@pytest.fixture
def service() -> Iterator[tuple[Scripted, str]]:
    scripted = Scripted()
    server = grpc.server(ThreadPoolExecutor(4))
    rpc.add_InferenceServicer_to_server(scripted, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield scripted, f"127.0.0.1:{port}"
    server.stop(0)


Ask = Callable[..., list[Delta]]


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, service: tuple[Scripted, str]) -> Ask:
    """Chats by one client or the other, and returns the deltas."""

    def chat(**options: Any) -> list[Delta]:
        if request.param == "sync":
            with Client(service[1]) as client:
                return list(client.chat(ASKED, **options))

        async def work() -> list[Delta]:
            async with AsyncClient(service[1]) as client:
                return [delta async for delta in client.chat(ASKED, **options)]

        return asyncio.run(work())

    return chat


def added(deltas: Sequence[Delta]) -> list[Message]:
    return [message for delta in deltas for message in delta.messages]


def test_a_function_is_run_and_the_model_answers_again(
    service: tuple[Scripted, str], ask: Ask
) -> None:
    scripted, _ = service
    scripted.answers = [[ROME], "It is hot."]
    deltas = ask(tools=[get_weather], temperature=0)
    assert "".join(delta.text for delta in deltas) == "It is hot."
    reasons = [delta.finish_reason for delta in deltas if delta.finish_reason]
    assert reasons == ["tool_calls", "stop"]
    assert [c for delta in deltas for c in delta.tool_calls] == [ROME]
    result = '{"city":"Rome","days":3,"unit":"F"}'
    assert added(deltas) == [
        {"role": "assistant", "content": "", "tool_calls": [ROME]},
        {"role": "tool", "content": result, "tool_call_id": "abcDEF123"},
    ]
    first, second = scripted.requests
    (tool,) = first.chat.tools
    assert (tool.name, tool.description.splitlines()[0]) == (
        "get_weather",
        "Tells the weather of a city.",
    )
    parameters = json.loads(tool.parameters)
    assert parameters["required"] == ["city"] and parameters["additionalProperties"] is False
    assert parameters["properties"]["days"]["maximum"] == 9
    assert len(first.chat.messages) == 1 and len(second.chat.messages) == 3
    assert second.chat.messages[1].tool_calls[0].arguments == ROME["arguments"]
    assert second.chat.messages[2].content == result
    assert second.chat.tools == first.chat.tools and second.sampling == first.sampling


def test_the_whole_answer_has_all_messages_and_the_sum_of_tokens(
    service: tuple[Scripted, str],
) -> None:
    scripted, target = service
    scripted.answers = [[ROME], "It is hot."]
    with Client(target) as client:
        answer = client.complete(ASKED, tools=[get_weather])
    assert (answer.text, answer.finish_reason, answer.tool_calls) == ("It is hot.", "stop", [])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (20, 4)
    assert [message["role"] for message in answer.messages] == ["assistant", "tool", "assistant"]
    scripted.answers = ["Gladly."]
    with Client(target) as client:
        client.complete([*ASKED, *answer.messages, *ASKED])
    roles = [message.role for message in scripted.requests[-1].chat.messages]
    assert roles == ["user", "assistant", "tool", "assistant", "user"]


def test_rounds_are_bounded_and_the_first_choice_is_for_the_first(
    service: tuple[Scripted, str], ask: Ask
) -> None:
    scripted, _ = service
    scripted.answers = [[ROME], [ROME], [ROME], "Enough."]
    deltas = ask(tools=[get_weather], tool_choice="required", max_rounds=3)
    assert "".join(delta.text for delta in deltas) == "Enough."
    modes = [request.chat.tool_choice.mode for request in scripted.requests]
    assert modes == [Mode.MODE_REQUIRED, Mode.MODE_AUTO, Mode.MODE_AUTO, Mode.MODE_NONE]


def test_several_calls_are_run_in_their_order(service: tuple[Scripted, str], ask: Ask) -> None:
    calls = [call("get_weather", f'{{"city": "{city}"}}', f"id{city}") for city in ("Oslo", "Bonn")]
    service[0].answers = [calls, "Both are cold."]
    messages = added(ask(tools=[get_weather]))
    assert [json.loads(message["content"])["city"] for message in messages[1:]] == ["Oslo", "Bonn"]
    assert [message["tool_call_id"] for message in messages[1:]] == ["idOslo", "idBonn"]


def test_a_tool_that_is_no_function_is_the_callers_to_run(
    service: tuple[Scripted, str], ask: Ask
) -> None:
    fly = Tool(name="fly", parameters={"type": "object"}, strict=True)
    service[0].answers = [[ROME, call("fly")]]
    deltas = ask(tools=[get_weather, fly], tool_choice=["fly"], parallel_tool_calls=True)
    assert deltas[-1].finish_reason == "tool_calls" and not added(deltas)
    chat = service[0].requests[0].chat
    assert [tool.strict for tool in chat.tools] == [False, True]
    assert (chat.tool_choice.mode, list(chat.tool_choice.allowed)) == (Mode.MODE_REQUIRED, ["fly"])
    assert chat.parallel_tool_calls


def test_calls_of_an_answer_that_was_cut_are_not_run(
    service: tuple[Scripted, str], ask: Ask
) -> None:
    scripted, _ = service
    scripted.answers, scripted.reason = [[call("fail")]], pb.FINISH_REASON_LENGTH
    deltas = ask(tools=[fail])
    assert deltas[-1].finish_reason == "length" and len(scripted.requests) == 1
    assert [c["name"] for delta in deltas for c in delta.tool_calls] == ["fail"]


def test_arguments_that_do_not_fit_are_told_to_the_model(
    service: tuple[Scripted, str], ask: Ask
) -> None:
    service[0].answers = [[call("get_weather", '{"city": "Rome", "days": 99}')], "Sorry."]
    _, result = added(ask(tools=[get_weather]))
    assert result["content"].startswith("Error: the arguments do not fit: ")
    assert "days" in result["content"]


def test_an_error_of_a_function_is_the_callers(service: tuple[Scripted, str], ask: Ask) -> None:
    service[0].answers = [[call("fail", '{"city": "Rome"}')]]
    with pytest.raises(KeyError) as caught:
        ask(tools=[fail])
    (note,) = caught.value.__notes__
    assert note == 'in the tool fail, which the model called with {"city": "Rome"}'


def test_functions_that_are_awaited(service: tuple[Scripted, str]) -> None:
    scripted, target = service
    scripted.answers = [[call("wait_for_weather", '{"city": "Rome"}')], "Hot."]

    async def work() -> str:
        async with AsyncClient(target) as client:
            answer = await client.complete(ASKED, tools=[wait_for_weather])
            return answer.messages[1]["content"]

    assert asyncio.run(work()) == "hot in Rome"
    with Client(target) as client, pytest.raises(TypeError, match="use AsyncClient"):
        client.chat(ASKED, tools=[wait_for_weather])


class Person(BaseModel):
    """A class of pydantic."""

    name: str


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("json_object", pb.ResponseFormat(json_object=pb.JsonObject())),
        ({"const": "ü"}, pb.ResponseFormat(json_schema='{"const": "ü"}')),
        (
            JsonSchema(schema={"const": 1}, strict=True),
            pb.ResponseFormat(json_schema='{"const": 1}', strict=True),
        ),
        (Person, pb.ResponseFormat(json_schema=json.dumps(Person.model_json_schema()))),
        (Regex("a+"), pb.ResponseFormat(regex="a+")),
        (OneOf(["yes", "no"]), pb.ResponseFormat(choice=pb.Texts(texts=["yes", "no"]))),
        (Lark("start: /a/"), pb.ResponseFormat(lark="start: /a/")),
        (Gbnf('root ::= "a"'), pb.ResponseFormat(gbnf='root ::= "a"')),
    ],
)
def test_forms_of_answers(
    service: tuple[Scripted, str], given: Any, message: pb.ResponseFormat
) -> None:
    scripted, target = service
    scripted.answers, scripted.weakened = ["{}"], "/a: uniqueItems"
    with Client(target) as client:
        answer = client.complete("x", response_format=given)
    assert scripted.requests[0].response_format == message
    assert answer.weakened == "/a: uniqueItems"


def by_place(city: str, /) -> str:
    """Takes its argument by its place."""
    return city


def of_a_class_without_schema(thing: Client) -> str:
    """Takes what JSON has not."""
    return ""


@pytest.mark.parametrize(
    ("prompt", "options", "text"),
    [
        (ASKED, {"response_format": 3}, "response_format cannot be 3; give 'json_object'"),
        (ASKED, {"response_format": OneOf("yes")}, "OneOf takes a list of texts"),
        (ASKED, {"tool_choice": "always"}, "tool_choice cannot be 'always': it is one of 'auto'"),
        (ASKED, {"tools": ["get_weather"]}, "a tool cannot be 'get_weather'"),
        (ASKED, {"tools": [lambda: 1]}, "a tool needs a name"),
        (ASKED, {"tools": [by_place]}, "by_place takes city by its place alone"),
        (ASKED, {"tools": [of_a_class_without_schema]}, "has no JSON Schema"),
        (ASKED, {"tools": [get_weather], "n": 2}, "n is more than 1"),
        (ASKED, {"tools": [get_weather], "max_rounds": -1}, "max_rounds is -1"),
        ("x", {"tools": [get_weather]}, "tools are for chats"),
        ("x", {"tool_choice": "auto"}, "tool_choice is for chats"),
        ([{"role": "user", "content": "x", "name": "y"}], {}, "perhaps 'tool_calls' or"),
    ],
)
def test_mistakes_are_named_before_anything_is_sent(
    service: tuple[Scripted, str], prompt: Any, options: Any, text: str
) -> None:
    with Client(service[1]) as client, pytest.raises((TypeError, ValueError), match=text):
        client.generate(prompt, **options)
    assert not service[0].requests


def test_tokens_of_a_chat_with_tools(service: tuple[Scripted, str]) -> None:
    with Client(service[1]) as client:
        client.tokenize(ASKED, tools=[get_weather])
    assert [tool.name for tool in service[0].requests[0].chat.tools] == ["get_weather"]


def test_methods_are_functions_too() -> None:
    class Station:
        def read(self, sensors: set[str]) -> str:
            """Reads sensors."""
            return ",".join(sorted(sensors))

    function = Function(Station().read)
    assert function.tool.parameters is not None
    assert list(function.tool.parameters["properties"]) == ["sensors"]
    assert function.run(function.read('{"sensors": ["b", "a"]}')) == "a,b"
