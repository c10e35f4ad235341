"""Errors as the classes that clients raise: what agents catch to wait, to shorten, to give up."""

from collections.abc import Iterator

import openai
import pytest

from tests.support.client_envs import CLIENTS, run_python
from tests.support.fakes import KEY, PATIENCE, Stack

INVALID = "invalid_request_error"
HELLO = [{"role": "user", "content": "one"}]


@pytest.fixture(params=["openai", "azure"])
def client(request: pytest.FixtureRequest, stack: Stack) -> Iterator[openai.OpenAI]:
    if request.param == "azure":
        made: openai.OpenAI = openai.AzureOpenAI(
            azure_endpoint=stack.url, api_key=KEY, api_version="2024-06-01", max_retries=0
        )
    else:
        made = openai.OpenAI(base_url=f"{stack.url}/v1", api_key=KEY, max_retries=0)
    with made.with_options(timeout=PATIENCE) as client:
        yield client


@pytest.mark.parametrize(
    ("script", "kind", "code", "type_"),
    [
        ("!long", openai.BadRequestError, "context_length_exceeded", "invalid_request_error"),
        (
            "!fail:InvalidRequest",
            openai.BadRequestError,
            "invalid_request",
            "invalid_request_error",
        ),
        (
            "!fail:InvalidParameter",
            openai.BadRequestError,
            "invalid_value",
            "invalid_request_error",
        ),
        ("!fail:Overloaded", openai.RateLimitError, "rate_limit_exceeded", "rate_limit_error"),
        ("!fail:EngineFailure", openai.APIStatusError, "model_error", "server_error"),
        ("!fail:Unavailable", openai.InternalServerError, "service_unavailable", "server_error"),
    ],
)
def test_openais_classes(
    client: openai.OpenAI, script: str, kind: type[openai.APIStatusError], code: str, type_: str
) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(
            model="azureai", messages=[{"role": "user", "content": script}]
        )
    assert (caught.value.code, caught.value.type) == (code, type_)


@pytest.mark.parametrize(
    ("parameters", "param", "code"),
    [
        ({"temperature": 7}, "temperature", "invalid_value"),
        ({"n": "many"}, "n", "invalid_type"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "missing_required_parameter"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "invalid_value",
        ),
    ],
)
def test_a_wrong_parameter_is_named(
    client: openai.OpenAI, parameters: dict[str, object], param: str, code: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=param) as caught:
        client.chat.completions.create(model="azureai", messages=HELLO, extra_body=parameters)  # type: ignore[arg-type]
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"


def test_a_wrong_key_and_a_model_that_is_not_there(stack: Stack) -> None:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as caught:
            stranger.models.list()
        assert (caught.value.code, caught.value.type) == (
            "invalid_api_key",
            "authentication_error",
        )
        with pytest.raises(openai.NotFoundError) as missing:
            stranger.with_options(api_key=KEY).models.retrieve("another")
        assert missing.value.code == "model_not_found"


def test_a_stream_that_breaks_off_raises(client: openai.OpenAI) -> None:
    asked = [{"role": "user", "content": "one !fail:EngineFailure"}]
    stream = client.chat.completions.create(model="azureai", messages=asked, stream=True)  # type: ignore[call-overload]
    with pytest.raises(openai.APIError, match="EngineFailure was asked for") as caught:
        list(stream)
    assert (caught.value.code, caught.value.type) == ("model_error", "server_error")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "script"),
    [
        ("litellm", "litellm_errors.py"),
        ("langchain", "langchain_errors.py"),
        ("anthropic", "anthropic_errors.py"),
    ],
)
def test_classes_of_clients_that_live_apart(stack: Stack, environment: str, script: str) -> None:
    asked = {"ENDPOINT": stack.url, "KEY": KEY, "LONG": "!long"}
    run_python(environment, CLIENTS / script, asked)
