"""litellm: the class that a prompt too long for the context raises, by which agents shorten it."""

import os

# Before the import, which would fetch a list of prices otherwise.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

URL, KEY, LONG = os.environ["ENDPOINT"], os.environ["KEY"], os.environ["LONG"]
litellm.telemetry = False
litellm.suppress_debug_info = True

for route in (
    {"model": "openai/azureai", "api_base": f"{URL}/v1"},
    {"model": "hosted_vllm/azureai", "api_base": f"{URL}/v1"},
    {"model": "mistral/azureai", "api_base": f"{URL}/v1"},
    {"model": "azure_ai/azureai", "api_base": URL},
):
    asked = [{"role": "user", "content": LONG}]
    try:
        litellm.completion(**route, api_key=KEY, messages=asked, num_retries=0)
        raise AssertionError("a prompt that is too long was taken")
    except litellm.ContextWindowExceededError as error:
        assert error.status_code == 400, error
