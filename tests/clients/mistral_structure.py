"""mistralai 3: chat.parse, response_format and a loop of calls, whole and streamed."""

from mistralai.client import Mistral
from task import (
    KEY,
    MAX_TOKENS,
    MODEL,
    NAMED,
    QUESTION,
    RESULT,
    TOOLS,
    URL,
    WEATHER_QUESTION,
    Person,
    check_call,
    step,
)

ASK = [{"role": "user", "content": QUESTION}]
ASK_WEATHER = [{"role": "user", "content": WEATHER_QUESTION}]


def structure(client: Mistral) -> None:
    options = {"model": MODEL, "messages": ASK, "max_tokens": MAX_TOKENS, "temperature": 0}
    step("parse")
    answer = client.chat.parse(response_format=Person, **options)
    assert isinstance(answer.choices[0].message.parsed, Person), answer
    step("parse, streamed")
    text = "".join(
        event.data.choices[0].delta.content or ""
        for event in client.chat.parse_stream(response_format=Person, **options)
    )
    assert Person.model_validate_json(text) == answer.choices[0].message.parsed
    step("json_object")
    answer = client.chat.complete(
        **{**options, "max_tokens": 40}, response_format={"type": "json_object"}
    )
    assert answer.choices[0].message.content.lstrip()[0] == "{"


def tools(client: Mistral) -> None:
    options = {"model": MODEL, "max_tokens": MAX_TOKENS, "temperature": 0, "tools": TOOLS}
    step("named call")
    answer = client.chat.complete(
        **options, messages=ASK_WEATHER, tool_choice=NAMED, parallel_tool_calls=False
    )
    choice = answer.choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.function.name == "get_weather"
    check_call(call.function.name, call.function.arguments)
    talk = [
        *ASK_WEATHER,
        choice.message,
        {
            "role": "tool",
            "name": call.function.name,
            "content": RESULT,
            "tool_call_id": call.id,
        },
    ]
    step("answer to a result")
    answer = client.chat.complete(
        **{**options, "max_tokens": 16}, messages=talk, tool_choice="none"
    )
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls
    step("any call, streamed")
    calls = [
        call
        for event in client.chat.stream(**options, messages=ASK_WEATHER, tool_choice="any")
        for call in event.data.choices[0].delta.tool_calls or []
    ]
    for call in calls:
        check_call(call.function.name, call.function.arguments)
    assert calls and [call.index for call in calls] == list(range(len(calls))), calls
    step("answer to a result, streamed")
    text = "".join(
        event.data.choices[0].delta.content or ""
        for event in client.chat.stream(
            **{**options, "max_tokens": 16}, messages=talk, tool_choice="none"
        )
    )
    assert text
    step("arguments as an object")
    history = [
        *ASK_WEATHER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "abcdefghi",
                    "function": {
                        "name": "get_weather",
                        "arguments": {"town": "Paris", "unit": "c"},
                    },
                }
            ],
        },
        {"role": "tool", "name": "get_weather", "content": RESULT, "tool_call_id": "abcdefghi"},
    ]
    answer = client.chat.complete(
        **{**options, "max_tokens": 16}, messages=history, tool_choice="none"
    )
    assert answer.choices[0].message.content


with Mistral(api_key=KEY, server_url=URL) as client:
    structure(client)
    tools(client)
