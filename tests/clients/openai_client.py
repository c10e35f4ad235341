"""openai: OpenAI at /v1, at the bare endpoint and at /openai/v1, and AzureOpenAI."""

import os

import openai

URL, KEY = os.environ["ENDPOINT"], os.environ["KEY"]
HISTORY = [
    {"role": "developer", "content": "You are brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
]


def counts(usage: openai.types.CompletionUsage) -> tuple[int, int, int]:
    """Returns the counts without what the prefix cache had, which the second request finds."""
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def check_chat(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=HISTORY, max_completion_tokens=8, temperature=0
    )
    assert answer.object == "chat.completion" and answer.choices[0].message.role == "assistant"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    stream = client.chat.completions.create(
        model=model,
        messages=HISTORY,
        max_completion_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    text = "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert text == answer.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert not last.choices and counts(last.usage) == counts(answer.usage)


with openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY) as client:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    check_chat(client, model.id)
    answer = client.chat.completions.create(
        model=model.id,
        messages=HISTORY,
        max_completion_tokens=4,
        n=2,
        logprobs=True,
        top_logprobs=3,
        logit_bias={"5": 1},
        presence_penalty=0.1,
        frequency_penalty=0.1,
        user="somebody",
        parallel_tool_calls=False,
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1},
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert len(answer.choices[1].logprobs.content[0].top_logprobs) == 3
    completion = client.completions.create(
        model=model.id, prompt="The capital of France is", max_tokens=4, temperature=0, logprobs=2
    )
    assert completion.object == "text_completion" and completion.choices[0].text
    assert len(completion.choices[0].logprobs.tokens) == completion.usage.completion_tokens
    text = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(
            model=model.id,
            prompt="The capital of France is",
            max_tokens=4,
            temperature=0,
            stream=True,
        )
        if chunk.choices
    )
    assert text == completion.choices[0].text
    try:
        client.models.retrieve("no-such-model")
        raise AssertionError("a model that is not there was found")
    except openai.NotFoundError as error:
        assert error.code, error.body
    try:
        client.chat.completions.create(model=model.id, messages=HISTORY, top_p=7)
        raise AssertionError("top_p 7 was taken")
    except openai.BadRequestError as error:
        assert "top_p" in str(error) and error.param == "top_p", error
        assert (error.code, error.type) == ("invalid_value", "invalid_request_error")
    try:
        client.embeddings.create(model=model.id, input="text")
        raise AssertionError("a chat model embedded")
    except openai.NotFoundError as error:
        assert "not found" in str(error).lower(), error
    try:
        client.with_options(api_key="wrong").models.list()
        raise AssertionError("a wrong key was taken")
    except openai.AuthenticationError as error:
        assert "auth token validation failed" in str(error), error

with openai.OpenAI(base_url=f"{URL}/openai/v1", api_key=KEY) as client:
    check_chat(client, "azureai")

# As the notebook that the seed links calls it.
with openai.OpenAI(base_url=URL, api_key=KEY) as client:
    answer = client.chat.completions.create(
        model="azureai", messages=HISTORY, max_tokens=4, extra_body={"safe_prompt": True}
    )
    assert answer.choices[0].message.role == "assistant"

with openai.AzureOpenAI(
    azure_endpoint=URL, api_key=KEY, api_version="2024-06-01", max_retries=0
) as client:
    check_chat(client, "azureai")
