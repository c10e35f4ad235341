"""litellm by its routes azure_ai, mistral and openai; it heals itself from refused extras."""

import os

# Before the import, which would fetch a list of prices otherwise.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

URL, KEY = os.environ["ENDPOINT"], os.environ["KEY"]
HISTORY = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
]
litellm.telemetry = False
litellm.suppress_debug_info = True
ROUTES = [
    {"model": "azure_ai/azureai", "api_base": URL},
    {"model": "mistral/azureai", "api_base": f"{URL}/v1"},
    {"model": "openai/azureai", "api_base": f"{URL}/v1"},
    {"model": "azureai", "api_base": URL, "custom_llm_provider": "custom_openai"},
]

for route in ROUTES:
    options = {**route, "api_key": KEY, "messages": HISTORY, "num_retries": 0}
    answer = litellm.completion(**options, max_tokens=8, temperature=0)
    assert answer.choices[0].message.role == "assistant", route
    assert answer.usage.total_tokens > 0
    chunks = list(litellm.completion(**options, max_tokens=8, temperature=0, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == (answer.choices[0].message.content or ""), route
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    try:
        litellm.completion(**options, max_tokens=8, top_p=7)
        raise AssertionError(f"top_p 7 was taken by {route}")
    except (litellm.BadRequestError, litellm.UnprocessableEntityError) as error:
        assert "top_p" in str(error), error
    try:
        litellm.completion(**{**options, "api_key": "wrong"})
        raise AssertionError(f"a wrong key was taken by {route}")
    except litellm.AuthenticationError:
        pass

# The bare route refuses n and logprobs in the sentence out of which it reads what to leave out.
answer = litellm.completion(
    **ROUTES[0], api_key=KEY, messages=HISTORY, max_tokens=8, n=2, logprobs=True, num_retries=0
)
assert len(answer.choices) == 1
answer = litellm.completion(
    **ROUTES[2], api_key=KEY, messages=HISTORY, max_tokens=8, n=2, logprobs=True, num_retries=0
)
assert len(answer.choices) == 2 and answer.choices[0].logprobs is not None
