"""mistralai 3: Mistral at /v1 and MistralAzure at /models."""

import os

from mistralai.azure.client import MistralAzure
from mistralai.client import Mistral
from mistralai.client.errors import SDKError

URL, KEY = os.environ["ENDPOINT"], os.environ["KEY"]
HISTORY = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
]


def check_chat(client, **options) -> None:
    answer = client.chat.complete(messages=HISTORY, max_tokens=8, temperature=0, **options)
    assert answer.choices[0].message.role == "assistant"
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    chunks = [
        event.data
        for event in client.chat.stream(messages=HISTORY, max_tokens=8, temperature=0, **options)
    ]
    text = "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert text == answer.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage.total_tokens == usage.total_tokens


with Mistral(api_key=KEY, server_url=URL) as client:
    (model,) = client.models.list().data
    assert type(model).__name__ == "BaseModelCard"
    assert client.models.retrieve(model_id=model.id).id == model.id
    check_chat(client, model=model.id)
    answer = client.chat.complete(
        model="mistral-small",
        messages=HISTORY,
        max_tokens=4,
        n=2,
        random_seed=7,
        safe_prompt=True,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        stop=["\n\n"],
    )
    assert len(answer.choices) == 2
    begun = [*HISTORY, {"role": "assistant", "content": "The capital of", "prefix": True}]
    answer = client.chat.complete(model=model.id, messages=begun, max_tokens=8, temperature=0)
    assert not answer.choices[0].message.content.startswith("The capital of")
    try:
        client.chat.complete(model=model.id, messages=HISTORY, top_p=7)
        raise AssertionError("top_p 7 was taken")
    except SDKError as error:
        assert error.status_code == 400 and '"param":"top_p"' in error.body, error

with Mistral(api_key="wrong", server_url=URL) as client:
    try:
        client.models.list()
        raise AssertionError("a wrong key was taken")
    except SDKError as error:
        assert error.status_code == 401, error

with MistralAzure(api_key=KEY, server_url=URL) as client:
    check_chat(client)
    answer = client.chat.complete(
        messages=HISTORY, max_tokens=4, random_seed=7, safe_prompt=True, temperature=0.5
    )
    assert answer.choices[0].message.role == "assistant"
