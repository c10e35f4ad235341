"""Structured answers and calls of functions, by the packages that people use, and on real weights.

What each client asks stands in its script in tests/clients: forms of answers, and loops from a
forced call to its result and on to an answer. No model is this small in use: that every answer is
whole and valid is the work of the server alone.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from tests.support.servers import Server, running, serve_command
from tests.support.structure_clients import (
    STRUCTURE_CLIENTS,
    StructureClient,
    recorded,
    sent,
)

pytestmark = pytest.mark.slow

# CI has time for these, and for the kept bodies of all in the tests of the gateway; soak runs all.
IN_CI = ("openai-python", "azure-python")
each_client = pytest.mark.parametrize(
    "client",
    [
        pytest.param(
            client,
            id=client.name,
            marks=[] if client.name in IN_CI else [pytest.mark.soak],
        )
        for client in STRUCTURE_CLIENTS
    ],
)


@each_client
def test_a_client_sends_the_bodies_that_are_kept(client: StructureClient) -> None:
    """The bodies in tests/clients/bodies are what these versions send, and nothing else."""
    versions, bodies = recorded(client.name)
    if client.environment is None and client.versions() != versions:
        pytest.skip(f"the bodies are of {versions}")
    assert client.versions() == versions
    assert sent(client) == bodies


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[Server]:
    with running(serve_command(smollm2, "--kv-memory", "256")) as server:
        yield server


@each_client
def test_a_client_runs_to_its_end(client: StructureClient, server: Server) -> None:
    client.run({"ENDPOINT": server.url, "KEY": server.key})


PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "format": "email", "maxLength": 30},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
        "is_member": {"type": "boolean"},
        "town": {"anyOf": [{"type": "string", "pattern": "^[A-Z][a-z]{1,9}$"}, {"type": "null"}]},
    },
    "required": ["name", "age", "email", "tags", "is_member", "town"],
    "additionalProperties": False,
}
FUNCTIONS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "town": {"type": "string", "maxLength": 20},
            "unit": {"enum": ["c", "f"]},
        },
        "required": ["town", "unit"],
        "additionalProperties": False,
    },
    "add": {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "minimum": 0, "maximum": 999},
            "b": {"type": "integer", "minimum": 0, "maximum": 999},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}


def _person(seed: int) -> dict[str, Any]:
    shape = {"name": "person", "strict": True, "schema": PERSON}
    return {
        "messages": [{"role": "user", "content": f"Describe person number {seed} as JSON."}],
        "response_format": {"type": "json_schema", "json_schema": shape},
    }


def _calls(seed: int) -> dict[str, Any]:
    functions = [
        {"name": name, "strict": True, "parameters": parameters}
        for name, parameters in FUNCTIONS.items()
    ]
    return {
        "messages": [{"role": "user", "content": f"What is {seed} plus {seed % 7}?"}],
        "tools": [{"type": "function", "function": function} for function in functions],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }


def _check(client: openai.OpenAI, asked: dict[str, Any], seed: int, *, is_streamed: bool) -> None:
    """Asks for one answer and holds it to its schema."""
    options = {"model": "azureai", "max_tokens": 500, "temperature": 1.0, "seed": seed, **asked}
    if is_streamed:
        with client.chat.completions.stream(**options) as stream:
            choice: Any = stream.get_final_completion().choices[0]
    else:
        choice = client.chat.completions.create(**options).choices[0]
    if "tools" not in asked:
        assert choice.finish_reason == "stop", choice
        checker = jsonschema.FormatChecker(["email"])
        jsonschema.validate(json.loads(choice.message.content), PERSON, format_checker=checker)
        return
    assert choice.finish_reason == "tool_calls", choice
    (call,) = choice.message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), FUNCTIONS[call.function.name])


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("ask", [_person, _calls])
@pytest.mark.parametrize("count", [4, pytest.param(50, marks=pytest.mark.soak)])
def test_every_answer_is_valid(
    count: int, ask: Callable[[int], dict[str, Any]], is_streamed: bool, server: Server
) -> None:
    """At temperature 1, sixteen at a time."""
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as client,
        ThreadPoolExecutor(16) as pool,
    ):
        checks = [
            pool.submit(_check, client, ask(seed), seed, is_streamed=is_streamed)
            for seed in range(count)
        ]
        failures = [error for check in checks if (error := check.exception())]
    assert not failures, f"{len(failures)} of {count}: {failures[0]}"
