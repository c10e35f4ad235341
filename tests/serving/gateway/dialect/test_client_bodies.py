"""What clients send for structured answers and calls of functions, and what the service is asked.

The bodies are those of tests/clients/bodies, which the packages themselves have sent; .NET's were
recorded from its packages elsewhere.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serving.proto import inference_pb2
from tests.support.fakes import PATIENCE, Stack, running_stack
from tests.support.gateway import BEARER
from tests.support.structure_clients import BODIES, Body, recorded

LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
# Client -> the calls of its script, and the request in the words of `summary`.
EXPECTED: dict[str, list[tuple[str, str]]] = {
    "openai-python": [
        ("chat parse", "json_schema!"),
        ("chat parse, cut", "json_schema!"),
        ("chat json_object", "json_object"),
        ("chat json_schema without strict", "json_schema"),
        ("chat named call", "required get_weather, of get_weather add, one"),
        (
            "chat answer to a result",
            "none, of get_weather add, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
        ("chat required call, strict, streamed", "required, of get_weather! add!, one"),
        (
            "chat answer to a result, streamed",
            "none, of get_weather add, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
        ("chat allowed_tools", "required get_weather, of get_weather add, one"),
        ("responses parse", "json_schema!"),
        ("responses named call", "required get_weather, of get_weather add, one"),
        (
            "responses answer to a result",
            "none, of get_weather add, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
        ("responses required call, strict, streamed", "required, of get_weather! add!, one"),
    ],
    "anthropic-python": [
        ("messages parse", "json_schema"),
        ("messages named call", "required get_weather, of get_weather add, one"),
        (
            "messages answer to a result",
            "none, of get_weather add, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
        (
            "messages answer to a failure, streamed",
            "none, of get_weather add, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
        ("messages any call, strict, streamed", "required, of get_weather! add!, one"),
        ("messages tool runner", "refused"),  # of a thread; it goes on without
        ("messages tool runner", "required weather, of weather, one"),
        (
            "messages tool runner",
            "required weather, of weather, one, after weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
    ],
    "extras-python": [
        ("vllm structured_outputs json", "json_schema"),
        ("vllm structured_outputs regex", "regex"),
        ("vllm structured_outputs choice", "choice"),
        ("vllm structured_outputs grammar", "lark"),
        ("vllm guided_json", "json_schema"),
        ("vllm guided_regex", "regex"),
        ("vllm guided_choice", "choice"),
        ("vllm guided_grammar", "lark"),
        ("llama.cpp json_schema", "json_schema"),
        ("llama.cpp grammar", "gbnf"),
        ("llama.cpp json_object with a schema", "json_schema"),
        ("llama.cpp json_schema without its object", "json_schema"),
        ("completion response_format", "json_schema!"),
        ("completion structured_outputs json", "json_schema"),
        ("completion llama.cpp json_schema", "json_schema"),
    ],
    "azure-python": [
        ("json_schema", "json_schema!"),
        ("json_object", "json_object"),
        ("named call", "required get_weather, of get_weather add, one"),
        (
            "answer to a result",
            "none, of get_weather add, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
        ("required call, streamed", "required, of get_weather add"),
        (
            "answer to a result, streamed",
            "none, of get_weather add, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
    ],
    "mistral-python": [
        ("parse", "json_schema!"),
        ("json_object", "json_object"),
        ("named call", "required get_weather, of get_weather add, one"),
        (
            "answer to a result",
            "none, of get_weather add, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
        ("any call, streamed", "required, of get_weather add"),
        (
            "arguments as an object",
            "none, of get_weather add, after get_weather abcdefghi, result abcdefghi",
        ),
    ],
    "langchain-python": [
        ("openai json_schema", "json_schema!"),
        ("openai function_calling", "required Person, of Person, one"),
        ("openai json_mode", "json_object"),
        ("openai get_weather call", "required get_weather, of get_weather add, one"),
        (
            "openai answer to a result",
            "none, of get_weather add, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
        ("openai any call", "required, of get_weather add"),
        ("mistral json_schema", "json_schema!"),
        ("mistral function_calling", "required, of Person"),
        ("mistral json_mode", "json_object"),
        ("mistral get_weather call", "required get_weather, of get_weather add, one"),
        (
            "mistral answer to a result",
            "none, of get_weather add, after get_weather p0NZPha49, result p0NZPha49",
        ),
        ("mistral any call", "required, of get_weather add"),
        ("openai function_calling strict", "required Person, of Person!, one"),
    ],
    "litellm-python": [
        ("azure_ai json_schema", "json_schema!"),
        ("azure_ai call without a choice", "unspecified, of get_weather add"),
        ("mistral json_schema", "json_schema!"),
        ("mistral required call", "required, of get_weather add"),
        (
            "mistral answer to the result of a required call",
            "none, of get_weather add, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
        ("openai named call", "required get_weather, of get_weather add, one"),
        (
            "openai answer to the result of a named call",
            "none, of get_weather add, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
        ("openai required call", "required, of get_weather add"),
        (
            "hosted_vllm answer to the result of a named call",
            "none, of get_weather add, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
    ],
    "instructor-python": [
        ("TOOLS", "required Person, of Person, one"),
        ("TOOLS, streamed", "required PartialPerson, of PartialPerson, one"),
        ("JSON", "json_object"),
        ("JSON_SCHEMA", "json_schema"),
        ("JSON_SCHEMA, streamed", "json_schema"),
        ("MD_JSON", ""),
    ],
    "pydantic-ai": [
        ("tool output", "required, of final_result"),
        ("NativeOutput", "json_schema"),
        ("PromptedOutput", "json_object"),
        ("agent with a function and a type", "required, of get_weather final_result"),
        (
            "agent with a function and a type",
            "required, of final_result, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
        ("named call", "required get_weather, of get_weather add!, one"),
        (
            "answer to the result of a named call",
            "none, of get_weather add!, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
        ("required call", "required, of get_weather add!"),
    ],
    "openai-agents": [
        ("chat output type", "json_schema!"),
        ("chat named call", "required get_weather, of get_weather!, one"),
        (
            "chat answer to a result",
            "json_schema!, none, of get_weather!, "
            "after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
        ("responses output type", "json_schema!"),
        ("responses named call", "required get_weather, of get_weather!, one"),
        (
            "responses answer to a result",
            "json_schema!, none, of get_weather!, "
            "after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
    ],
    "openai-node": [
        ("chat parse", "json_schema!"),
        ("chat named call", "required get_weather, of get_weather add, one"),
        (
            "chat answer to the result of a named call",
            "none, of get_weather add, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
        ("chat required, zodFunction, call", "required, of get_weather! add!, one"),
        (
            "chat answer to the result of a required, zodFunction, call",
            "none, of get_weather! add!, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
        ("responses parse", "json_schema!"),
        ("responses named call", "required get_weather, of get_weather! add!, one"),
        (
            "responses answer to a result",
            "none, of get_weather! add!, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
        ("responses required call, streamed", "required, of get_weather! add!"),
    ],
    "azure-node": [
        ("json_schema", "json_schema!"),
        ("json_object", "json_object"),
        ("named call", "required get_weather, of get_weather add, one"),
        (
            "answer to the result of a named call",
            "none, of get_weather add, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
        ("required call", "required, of get_weather add"),
    ],
    "langchain-node": [
        ("openai jsonSchema", "json_schema!"),
        ("openai functionCalling", "required person, of person, one"),
        ("openai jsonMode", "json_object"),
        ("openai get_weather call", "required get_weather, of get_weather add, one"),
        (
            "openai answer to the result of a get_weather call",
            "none, of get_weather add, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
        ("openai any call", "required, of get_weather add"),
        ("mistral jsonSchema", "required, of person"),
        ("mistral jsonMode", "json_object"),
        ("mistral named call", "required get_weather, of get_weather add, one"),
        (
            "mistral answer to the result of a named call",
            "none, of get_weather add, after get_weather 00007SWYx, result 00007SWYx",
        ),
        ("mistral any call", "required, of get_weather add"),
    ],
    "vercel-node": [
        ("compatible object", "json_schema!"),
        ("compatible loop from a named call", "required get_weather, of get_weather add, one"),
        (
            "compatible loop from a named call",
            "none, of get_weather add, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
        ("compatible loop from a required call", "required, of get_weather add"),
        ("openai responses object", "json_schema!"),
        (
            "openai responses loop from a named call",
            "required get_weather, of get_weather add, one",
        ),
        (
            "openai responses loop from a named call",
            "none, of get_weather add, after get_weather call_Zk3-q_90, result call_Zk3-q_90",
        ),
        ("openai responses loop from a required call", "required, of get_weather add"),
    ],
    "dotnet": [
        ("azure json_object", "json_object"),
        ("azure json_schema", "json_schema!"),
        ("azure named call", "required get_weather, of get_weather, one"),
        ("azure required call, streamed", "required, of get_weather"),
        (
            "azure answer to a result",
            "none, of get_weather, after get_weather abcdefghi, result abcdefghi",
        ),
        ("openai json_schema", "json_schema!"),
        ("openai json_object, streamed", "json_object"),
        ("openai named call", "required get_weather, of get_weather!, one"),
        (
            "openai answer to a result",
            "none, of get_weather!, after get_weather abcdefghi, result abcdefghi",
        ),
        ("openai required call, streamed", "required, of get_weather!, one"),
        ("azure openai json_schema", "json_schema!"),
        ("azure openai json_object, streamed", "json_object"),
        ("azure openai named call", "required get_weather, of get_weather!, one"),
        (
            "azure openai answer to a result",
            "none, of get_weather!, after get_weather abcdefghi, result abcdefghi",
        ),
        ("azure openai required call, streamed", "required, of get_weather!, one"),
        ("responses json_schema", "json_schema!"),
        ("responses named call", "required get_weather, of get_weather!, one"),
        ("responses answer to a result", "after get_weather call_1, result call_1"),
        ("extensions.ai json_schema", "json_schema"),
        ("extensions.ai required call", "required, of get_weather"),
        (
            "extensions.ai call without a choice",
            "auto, of get_weather, after get_weather abcdefghi, result abcdefghi",
        ),
        ("semantic kernel required call", "required, of clock-Now"),
        (
            "semantic kernel answer to a result",
            "none, of NonInvocableTool, after clock-Now abcdefghi, result abcdefghi",
        ),
        ("semantic kernel required call by a deployment", "required, of clock-Now"),
        (
            "semantic kernel answer to a result by a deployment",
            "none, of NonInvocableTool, after clock-Now abcdefghi, result abcdefghi",
        ),
    ],
}


def summary(request: inference_pb2.GenerateRequest) -> str:
    """A request in words: its form or its tools, which of them must be called, what came before.

    `a!` is a tool whose schema is strict, `one` stands where an answer may hold one call only.
    """
    words = []
    form, chat = request.response_format, request.chat
    if kind := form.WhichOneof("kind"):
        words += [kind + ("!" if form.strict else "")]
    if chat.tools:
        mode = inference_pb2.ToolChoice.Mode.Name(chat.tool_choice.mode).removeprefix("MODE_")
        words += [" ".join([mode.lower(), *chat.tool_choice.allowed])]
        words += ["of " + " ".join(tool.name + ("!" if tool.strict else "") for tool in chat.tools)]
    if chat.HasField("parallel_tool_calls"):
        words += ["many" if chat.parallel_tool_calls else "one"]
    for message in chat.messages:
        words += [f"after {call.name} {call.id}" for call in message.tool_calls]
        words += [f"result {message.tool_call_id}"] if message.tool_call_id else []
    return ", ".join(words)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as stack:
        stack.service.aliases = {"*"}  # the bodies name the models of their recordings
        yield stack


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(headers=BEARER, timeout=PATIENCE) as client:
        yield client


def asked(stack: Stack, http: httpx.Client, body: Body) -> inference_pb2.GenerateRequest:
    """What the service is asked for a body; the gateway has answered with 200."""
    stack.service.reset()
    answer = http.post(stack.url + body.path, json=body.body)
    assert answer.status_code == 200, answer.text
    (request,) = stack.service.requests
    return request


def ordered(text: str) -> object:
    """JSON whose objects are lists of pairs, so that the order of the names counts."""
    return json.loads(text, object_pairs_hook=list)


def parts(value: Any) -> Iterator[object]:
    """Every value within a JSON value, as `ordered` reads it."""
    yield ordered(json.dumps(value))
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        yield from parts(item)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_bodies_of_a_client(stack: Stack, http: httpx.Client, name: str) -> None:
    seen = []
    for body in recorded(name)[1]:
        if "thread" in body.body:
            assert http.post(stack.url + body.path, json=body.body).status_code == 400
            seen.append((body.call, "refused"))
            continue
        request = asked(stack, http, body)
        seen.append((body.call, summary(request)))
        schemas = [tool.parameters for tool in request.chat.tools]
        schemas += [request.response_format.json_schema] * bool(request.response_format.json_schema)
        # A model writes the properties in this order: it is the caller's.
        sent = list(parts(body.body))
        assert all(ordered(schema) in sent for schema in schemas), body.call
        for message in request.chat.messages:
            assert all(
                call.arguments in sent or ordered(call.arguments) in sent
                for call in message.tool_calls
            )
            # Results that are errors begin with a word of ours.
            content = message.content.removeprefix("Error: ")
            assert content == "" or content in sent
        limits = [body.body.get(name) for name in LIMITS]
        assert request.max_tokens in limits, body.call
    assert seen == EXPECTED[name]


def test_every_client_has_its_bodies() -> None:
    assert set(EXPECTED) == {path.stem for path in BODIES.glob("*.jsonl")}
    assert sum(map(len, EXPECTED.values())) >= 25
