"""Whom a request asks for: the model, by its names or by none, an adapter, or nobody."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.fakes import Stack, running_stack
from tests.support.gateway import BEARER, chat_body, check_error, events

AZURE = ("/chat/completions", "/models/chat/completions", "/completions")
OPENAI = ("/v1/chat/completions", "/openai/v1/chat/completions", "/v1/completions")
RESPONSES = ("/v1/responses", "/openai/responses", "/responses")
DEPLOYMENTS = "/openai/deployments/{name}/chat/completions"


@pytest.fixture(autouse=True)
def adapters(stack: Stack) -> Iterator[None]:
    stack.service.adapters = {"tuned": "ab" * 32, "a/b": "cd" * 32}
    yield
    stack.service.adapters = {}


def body_for(path: str, **fields: Any) -> dict[str, Any]:
    if path.endswith("responses"):
        return {"input": "one two"} | fields
    if path.endswith("chat/completions"):
        return chat_body("one two", **fields)
    return {"prompt": "one two"} | fields


def asked(stack: Stack) -> list[str]:
    """The names that the service was asked for."""
    return [request.model for request in stack.service.requests]


@pytest.mark.parametrize("path", AZURE + OPENAI + RESPONSES)
@pytest.mark.parametrize(
    ("given", "name", "answers"),
    [
        ({}, "", "scripted-7B"),
        ({"model": None}, "", "scripted-7B"),
        ({"model": ""}, "", "scripted-7B"),
        ({"model": "scripted-7B"}, "scripted-7B", "scripted-7B"),
        ({"model": "azureai"}, "azureai", "scripted-7B"),
        ({"model": "tuned"}, "tuned", "tuned"),
    ],
)
def test_a_name_means_the_model_or_an_adapter(
    client: httpx.Client, stack: Stack, path: str, given: dict[str, Any], name: str, answers: str
) -> None:
    answer = client.post(path, json=body_for(path, **given))
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == answers
    assert asked(stack) == [name]


@pytest.mark.parametrize("path", AZURE + OPENAI + RESPONSES)
@pytest.mark.parametrize("fields", [{}, {"stream": True}])
def test_a_name_that_nothing_has_is_404(
    client: httpx.Client, path: str, fields: dict[str, Any]
) -> None:
    answer = client.post(path, json=body_for(path, model="Tuned", **fields))
    message = check_error(answer, 404, "unknown_model")
    assert "'Tuned'" in message and "'scripted-7B'" in message
    if path not in AZURE:
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_every_event_of_a_stream_names_the_adapter(client: httpx.Client) -> None:
    path = "/v1/chat/completions"
    answer = client.post(path, json=chat_body("!open one two", model="tuned", stream=True))
    assert {event["model"] for event in events(iter(answer.text.splitlines()))} == {"tuned"}
    answer = client.post("/v1/responses", json={"input": "one", "model": "tuned", "stream": True})
    assert answer.text.count('"model":"tuned"') == 3  # of created, in_progress and completed


def test_the_path_names_a_deployment_whatever_the_body_says(
    client: httpx.Client, stack: Stack
) -> None:
    for name, body, answers in [
        ("tuned", {}, "tuned"),
        ("tuned", {"model": "scripted-7B"}, "tuned"),
        ("scripted-7B", {"model": "tuned"}, "scripted-7B"),
    ]:
        answer = client.post(DEPLOYMENTS.format(name=name), json=chat_body("one", **body))
        assert answer.json()["model"] == answers
    assert asked(stack) == ["tuned", "tuned", "scripted-7B"]
    answer = client.post(DEPLOYMENTS.format(name="x" * 300), json=chat_body("one"))
    assert "'xxx" in check_error(answer, 404, "unknown_model")
    assert len(asked(stack)) == 3  # a name longer than any was sent to nobody


def test_prompts_of_one_request_go_to_one_adapter(client: httpx.Client, stack: Stack) -> None:
    answer = client.post("/v1/completions", json={"prompt": ["one", "two"], "model": "tuned"})
    assert answer.json()["model"] == "tuned"
    assert asked(stack) == ["tuned", "tuned"]


def test_a_service_that_reads_no_names_answers_only_for_its_own(
    client: httpx.Client, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is older than adapters would answer for the model whatever is asked for."""
    monkeypatch.setattr(stack.service, "reads_names", False)
    path = "/v1/chat/completions"
    assert client.post(path, json=chat_body("one", model="scripted-7B")).status_code == 200
    assert client.post(path, json=chat_body("one")).status_code == 200
    for name in ("tuned", "azureai"):
        answer = client.post(path, json=chat_body("one", model=name))
        check_error(answer, 404, "unknown_model")


@pytest.mark.parametrize("path", ["/v1/models", "/models", "/openai/models"])
def test_the_model_and_its_adapters_are_listed(client: httpx.Client, path: str) -> None:
    listed = client.get(path).json()["data"]
    shown = [(card["id"], card["root"], card["parent"], card["type"]) for card in listed]
    assert shown == [
        ("scripted-7B", "scripted-7B", None, "base"),
        ("a/b", "scripted-7B", "scripted-7B", "fine-tuned"),
        ("tuned", "scripted-7B", "scripted-7B", "fine-tuned"),
    ]
    assert [card.get("job") for card in listed] == [None, "cd" * 8, "ab" * 8]
    assert {card["max_model_len"] for card in listed} == {64}
    for card in listed:
        assert client.get(f"{path}/{card['id']}").json() == card
    check_error(client.get(f"{path}/nobody"), 404, "unknown_model")


def test_the_list_follows_adapters_within_a_second(
    client: httpx.Client, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.get("/v1/models")
    monkeypatch.setattr(stack.service, "adapters", {"later": "ef" * 32})
    deadline = time.monotonic() + 20
    while "later" not in (names := [c["id"] for c in client.get("/v1/models").json()["data"]]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert names == ["scripted-7B", "later"]


def test_the_models_own_sampling_parameters_are_told_and_left_to_the_service() -> None:
    with running_stack() as stack, httpx.Client(base_url=stack.url, headers=BEARER) as client:
        stack.service.sampling_defaults.temperature = 0.2
        stack.service.sampling_defaults.top_k = 12_345_678
        (card,) = client.get("/v1/models").json()["data"]
        assert card["default_model_temperature"] == 0.2  # which Mistral's client reads
        assert card["default_sampling_params"] == {"temperature": 0.2, "top_k": 12_345_678}
        assert client.get("/info").json()["default_sampling_params"] == {
            "temperature": 0.2,
            "top_k": 12_345_678,
        }
        for path in (*AZURE, *OPENAI, *RESPONSES):
            assert client.post(path, json=body_for(path)).status_code == 200
        assert not any(r.sampling.HasField("temperature") for r in stack.service.requests)
        client.post("/v1/completions", json={"prompt": "one", "temperature": 0.5})
        assert stack.service.requests[-1].sampling.temperature == 0.5


def test_a_model_without_values_of_its_own_tells_none(client: httpx.Client) -> None:
    card = client.get("/v1/models").json()["data"][0]
    assert not {"default_model_temperature", "default_sampling_params"} & card.keys()
    assert list(client.get("/info").json()) == ["model_name", "model_type", "model_provider_name"]
