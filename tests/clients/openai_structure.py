"""openai's structured answers and calls of functions, by chat completions and by responses."""

import openai
from task import (
    FUNCTIONS,
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
    check_person,
    step,
)

ASK = [{"role": "user", "content": QUESTION}]
ASK_WEATHER = [{"role": "user", "content": WEATHER_QUESTION}]
STRICT_TOOLS = [
    openai.pydantic_function_tool(model, name=name) for name, model in FUNCTIONS.items()
]


def chat_structure(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "messages": ASK, "max_tokens": MAX_TOKENS, "temperature": 0}
    step("chat parse")
    answer = client.chat.completions.parse(**options, response_format=Person)
    assert isinstance(answer.choices[0].message.parsed, Person), answer
    assert answer.choices[0].finish_reason == "stop" and not answer.choices[0].message.refusal
    step("chat parse, streamed")
    with client.chat.completions.stream(**options, response_format=Person) as stream:
        last = stream.get_final_completion()
    assert last.choices[0].message.parsed == answer.choices[0].message.parsed
    step("chat parse, cut")
    try:
        client.chat.completions.parse(**{**options, "max_tokens": 3}, response_format=Person)
        raise AssertionError("three tokens held a person")
    except openai.LengthFinishReasonError:
        pass
    step("chat json_object")
    answer = client.chat.completions.create(
        **{**options, "max_tokens": 40}, response_format={"type": "json_object"}
    )
    assert answer.choices[0].message.content.lstrip()[0] == "{", answer
    step("chat json_schema without strict")
    answer = client.chat.completions.create(
        **options,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": Person.model_json_schema()},
        },
    )
    check_person(answer.choices[0].message.content)


def chat_tools(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "max_tokens": MAX_TOKENS, "temperature": 0}
    step("chat named call")
    answer = client.chat.completions.create(
        **options, messages=ASK_WEATHER, tools=TOOLS, tool_choice=NAMED
    )
    choice = answer.choices[0]
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.function.name == "get_weather" and call.id
    assert choice.finish_reason == "tool_calls", choice
    check_call(call.function.name, call.function.arguments)
    talk = [
        *ASK_WEATHER,
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": RESULT},
    ]
    step("chat answer to a result")
    answer = client.chat.completions.create(
        **{**options, "max_tokens": 16}, messages=talk, tools=TOOLS, tool_choice="none"
    )
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls
    step("chat required call, strict, streamed")
    with client.chat.completions.stream(
        **options,
        messages=ASK_WEATHER,
        tools=STRICT_TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
    ) as stream:
        final = stream.get_final_completion().choices[0]
    (call,) = final.message.tool_calls
    assert final.finish_reason == "tool_calls"
    assert isinstance(call.function.parsed_arguments, FUNCTIONS[call.function.name]), call
    step("chat answer to a result, streamed")
    talk = [
        *ASK_WEATHER,
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
            ],
        },
        {"role": "tool", "tool_call_id": call.id, "content": RESULT},
    ]
    chunks = client.chat.completions.create(
        **{**options, "max_tokens": 16},
        messages=talk,
        tools=TOOLS,
        tool_choice="none",
        stream=True,
        stream_options={"include_usage": True},
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas)
    assert not any(delta.tool_calls for delta in deltas)
    step("chat allowed_tools")
    answer = client.chat.completions.create(
        **options,
        messages=ASK_WEATHER,
        tools=TOOLS,
        tool_choice={
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [NAMED]},
        },
        parallel_tool_calls=False,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"


def responses_structure(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "input": QUESTION, "max_output_tokens": MAX_TOKENS, "store": False}
    step("responses parse")
    answer = client.responses.parse(**options, temperature=0, text_format=Person)
    assert isinstance(answer.output_parsed, Person) and answer.status == "completed", answer
    step("responses parse, streamed")
    with client.responses.stream(**options, temperature=0, text_format=Person) as stream:
        last = stream.get_final_response()
    assert last.output_parsed == answer.output_parsed


def responses_tools(client: openai.OpenAI) -> None:
    tools = [{"type": "function", "strict": False, **tool["function"]} for tool in TOOLS]
    strict = [
        openai.pydantic_function_tool(model, name=name)["function"]
        for name, model in FUNCTIONS.items()
    ]
    strict = [{"type": "function", **function} for function in strict]
    options = {"model": MODEL, "max_output_tokens": MAX_TOKENS, "store": False, "temperature": 0}
    talk = [{"role": "user", "content": WEATHER_QUESTION}]
    step("responses named call")
    answer = client.responses.create(
        **options,
        input=talk,
        tools=tools,
        tool_choice={"type": "function", "name": "get_weather"},
    )
    (call,) = [item for item in answer.output if item.type == "function_call"]
    check_call(call.name, call.arguments)
    talk = [
        *talk,
        *answer.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": RESULT},
    ]
    step("responses answer to a result")
    answer = client.responses.create(
        **{**options, "max_output_tokens": 16}, input=talk, tools=tools, tool_choice="none"
    )
    assert answer.output_text, answer
    step("responses required call, strict, streamed")
    with client.responses.stream(
        **options,
        input=talk[:1],
        tools=strict,
        tool_choice="required",
        parallel_tool_calls=False,
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert "response.function_call_arguments.done" in kinds, kinds
    (call,) = [item for item in final.output if item.type == "function_call"]
    check_call(call.name, call.arguments)


with openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0) as client:
    chat_structure(client)
    chat_tools(client)
    responses_structure(client)
    responses_tools(client)
