"""litellm by its routes: structured answers and loops of calls."""

import os

# Before the import, which would fetch a list of prices otherwise.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from task import (
    KEY,
    MAX_TOKENS,
    NAMED,
    QUESTION,
    RESULT,
    TOOLS,
    URL,
    WEATHER_QUESTION,
    Person,
    check_call,
    check_person,
    step,
)

litellm.telemetry = False
litellm.suppress_debug_info = True
ROUTES = {
    "azure_ai": {"model": "azure_ai/azureai", "api_base": URL},
    "mistral": {"model": "mistral/azureai", "api_base": f"{URL}/v1"},
    "openai": {"model": "openai/azureai", "api_base": f"{URL}/v1"},
    "hosted_vllm": {"model": "hosted_vllm/azureai", "api_base": f"{URL}/v1"},
}
ASK = [{"role": "user", "content": QUESTION}]
ASK_WEATHER = [{"role": "user", "content": WEATHER_QUESTION}]
# This route of litellm refuses tool_choice on the client's side: the model is left to decide.
WITHOUT_CHOICE = {"azure_ai"}

for name, route in ROUTES.items():
    options = {
        **route,
        "api_key": KEY,
        "num_retries": 0,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
    }
    step(f"{name} json_schema")
    answer = litellm.completion(**options, messages=ASK, response_format=Person)
    person = check_person(answer.choices[0].message.content)
    step(f"{name} json_schema, streamed")
    chunks = litellm.completion(**options, messages=ASK, response_format=Person, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert check_person(text) == person, route
    if name in WITHOUT_CHOICE:
        step(f"{name} call without a choice")
        litellm.completion(**options, messages=ASK_WEATHER, tools=TOOLS)
        continue
    # Its route to Mistral drops a named choice without a word.
    for choice in ("required",) if name == "mistral" else (NAMED, "required"):
        kind = choice if isinstance(choice, str) else "named"
        step(f"{name} {kind} call")
        answer = litellm.completion(
            **options, messages=ASK_WEATHER, tools=TOOLS, tool_choice=choice
        )
        calls = answer.choices[0].message.tool_calls
        assert calls and answer.choices[0].finish_reason == "tool_calls", answer
        for call in calls:
            check_call(call.function.name, call.function.arguments)
        talk = [*ASK_WEATHER, answer.choices[0].message]
        talk += [{"role": "tool", "tool_call_id": call.id, "content": RESULT} for call in calls]
        step(f"{name} answer to the result of a {kind} call")
        answer = litellm.completion(
            **{**options, "max_tokens": 16}, messages=talk, tools=TOOLS, tool_choice="none"
        )
        assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls
        step(f"{name} {kind} call, streamed")
        chunks = list(
            litellm.completion(
                **options, messages=ASK_WEATHER, tools=TOOLS, tool_choice=choice, stream=True
            )
        )
        whole = litellm.stream_chunk_builder(chunks)
        assert whole.choices[0].message.tool_calls, whole
        for call in whole.choices[0].message.tool_calls:
            check_call(call.function.name, call.function.arguments)
