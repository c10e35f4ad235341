"""azure-ai-inference, sync and async: `azure_inference.py` with AZURE_INFERENCE_ENDPOINT and
AZURE_INFERENCE_CREDENTIAL, or without the latter by DefaultAzureCredential. Runs on 1.0.0b6 and b9.
"""

import asyncio
import os

from azure.ai.inference import ChatCompletionsClient
from azure.ai.inference.aio import ChatCompletionsClient as AsyncClient
from azure.ai.inference.models import AssistantMessage, SystemMessage, UserMessage
from azure.core.credentials import AzureKeyCredential
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError

ENDPOINT = os.environ["AZURE_INFERENCE_ENDPOINT"]
KEY = os.environ.get("AZURE_INFERENCE_CREDENTIAL")
HISTORY = [
    SystemMessage(content="You are brief."),
    UserMessage(content="What is the capital of France?"),
    AssistantMessage(content="Paris."),
    UserMessage(content="And of Italy?"),
]


def check_completion(answer) -> None:
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and isinstance(choice.message.content, str)
    assert choice.finish_reason in ("stop", "length"), choice
    usage = answer.usage
    assert usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= 8
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert len(answer.id) == 32 and answer.created and answer.model


def check_stream(updates) -> None:
    first, *_, last = updates
    assert first.choices[0].delta.role == "assistant"
    assert all(update.choices[0].delta.role is None for update in updates[1:])
    assert last.choices[0].finish_reason in ("stop", "length")
    assert 0 < last.usage.completion_tokens <= 8
    assert len({update.id for update in updates}) == 1


def check_error(error: HttpResponseError, status: int, text: str) -> None:
    assert error.status_code == status, error
    assert text in error.message, error.message
    assert error.error is not None and error.error.code


def sync_client(credential) -> None:
    with ChatCompletionsClient(ENDPOINT, credential) as client:
        model = client.get_model_info()
        assert model.model_name and model.model_provider_name, model
        assert model.model_type == "chat-completions", model
        answer = client.complete(messages=HISTORY, max_tokens=8, temperature=0, seed=1)
        check_completion(answer)
        streamed = list(
            client.complete(messages=HISTORY, max_tokens=8, temperature=0, seed=1, stream=True)
        )
        check_stream(streamed)
        text = "".join(update.choices[0].delta.content for update in streamed)
        assert text == answer.choices[0].message.content
        extras = client.complete(
            messages=HISTORY,
            max_tokens=4,
            model_extras={"logprobs": True, "top_logprobs": 2, "n": 2, "logit_bias": {"5": 1}},
        )
        assert [choice["index"] for choice in extras.choices] == [0, 1]
        logprobs = extras.choices[0]["logprobs"]["content"]
        assert len(logprobs[0]["top_logprobs"]) == 2 and logprobs[0]["logprob"] <= 0
        try:
            client.complete(messages=HISTORY, model_extras={"no_such_thing": 1})
            raise AssertionError("an unknown extra was taken")
        except HttpResponseError as error:
            check_error(error, 422, "Extra inputs are not permitted")
        try:
            client.complete(messages=HISTORY, temperature=7)
            raise AssertionError("temperature 7 was taken")
        except HttpResponseError as error:
            check_error(error, 422, "temperature")


async def async_client(credential) -> None:
    async with credential, AsyncClient(ENDPOINT, credential) as client:
        assert (await client.get_model_info()).model_name
        check_completion(await client.complete(messages=HISTORY, max_tokens=8))
        stream = await client.complete(messages=HISTORY, max_tokens=8, stream=True)
        check_stream([update async for update in stream])


def wrong_key() -> None:
    with ChatCompletionsClient(ENDPOINT, AzureKeyCredential("wrong")) as client:
        try:
            client.complete(messages=HISTORY)
            raise AssertionError("a wrong key was taken")
        except ClientAuthenticationError as error:
            check_error(error, 401, "auth token validation failed")


class AsyncKey(AzureKeyCredential):
    """A key has nothing to close; `async with` wants to."""

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error: object) -> None:
        pass


if KEY is not None:
    sync_client(AzureKeyCredential(KEY))
    asyncio.run(async_client(AsyncKey(KEY)))
    wrong_key()
else:
    from azure.identity import DefaultAzureCredential
    from azure.identity.aio import DefaultAzureCredential as AsyncCredential

    sync_client(DefaultAzureCredential())
    asyncio.run(async_client(AsyncCredential()))
