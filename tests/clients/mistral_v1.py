"""mistralai 1, the last line with mistralai_azure, as the seed's notebook uses it."""

import os

from mistralai_azure import MistralAzure
from mistralai_azure.models import SDKError

URL, KEY = os.environ["ENDPOINT"], os.environ["KEY"]
HISTORY = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
]

with MistralAzure(azure_api_key=KEY, azure_endpoint=URL) as client:
    answer = client.chat.complete(messages=HISTORY, max_tokens=8, temperature=0)
    assert answer.choices[0].message.role == "assistant"
    chunks = [
        event.data
        for event in client.chat.stream(
            messages=HISTORY, max_tokens=8, temperature=0, safe_prompt=False
        )
    ]
    text = "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage == answer.usage
    answer = client.chat.complete(
        messages=HISTORY, max_tokens=4, n=2, random_seed=7, safe_prompt=True
    )
    assert len(answer.choices) == 2
    try:
        client.chat.complete(messages=HISTORY, top_p=7)
        raise AssertionError("top_p 7 was taken")
    except SDKError as error:
        assert error.status_code == 400 and '"param":"top_p"' in error.body, error

with MistralAzure(azure_api_key="wrong", azure_endpoint=URL) as client:
    try:
        client.chat.complete(messages=HISTORY)
        raise AssertionError("a wrong key was taken")
    except SDKError as error:
        assert error.status_code == 401, error
