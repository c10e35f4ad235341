"""anthropic's structured answers, calls of tools, and its own loop of calls."""

from typing import Literal

import anthropic
from pydantic import BaseModel
from task import (
    FUNCTIONS,
    KEY,
    MAX_TOKENS,
    MODEL,
    QUESTION,
    RESULT,
    URL,
    WEATHER_QUESTION,
    GetWeather,
    step,
)


class Person(BaseModel):
    """A person; the package sends no bounds of texts and numbers."""

    town: Literal["Paris", "Rome", "Oslo"]
    drink: Literal["tea", "water"] | None
    is_member: bool


ASK = [{"role": "user", "content": QUESTION}]
ASK_WEATHER = [{"role": "user", "content": WEATHER_QUESTION}]
TOOLS = [
    {"name": name, "description": model.__doc__, "input_schema": model.model_json_schema()}
    for name, model in FUNCTIONS.items()
]
OPTIONS = {"model": MODEL, "max_tokens": MAX_TOKENS, "extra_body": {"temperature": 0}}


def structure(client: anthropic.Anthropic) -> None:
    step("messages parse")
    answer = client.messages.parse(**OPTIONS, messages=ASK, output_format=Person)
    assert isinstance(answer.parsed_output, Person) and answer.stop_reason == "end_turn", answer
    step("messages parse, streamed")
    with client.messages.stream(**OPTIONS, messages=ASK, output_format=Person) as stream:
        last = stream.get_final_message()
    assert last.parsed_output == answer.parsed_output


def tools(client: anthropic.Anthropic) -> None:
    step("messages named call")
    answer = client.messages.create(
        **OPTIONS,
        messages=ASK_WEATHER,
        tools=TOOLS,
        tool_choice={"type": "tool", "name": "get_weather"},
    )
    (call,) = [block for block in answer.content if block.type == "tool_use"]
    assert answer.stop_reason == "tool_use" and call.name == "get_weather", answer
    GetWeather.model_validate(call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": RESULT}
    talk = [
        *ASK_WEATHER,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    step("messages answer to a result")
    short = {**OPTIONS, "max_tokens": 16}
    answer = client.messages.create(
        **short, messages=talk, tools=TOOLS, tool_choice={"type": "none"}
    )
    assert [block.type for block in answer.content] == ["text"], answer
    failed = {**result, "content": [{"type": "text", "text": "no such town"}], "is_error": True}
    talk[-1] = {"role": "user", "content": [failed, {"type": "text", "text": "And now?"}]}
    step("messages answer to a failure, streamed")
    with client.messages.stream(
        **short, messages=talk, tools=TOOLS, tool_choice={"type": "none"}
    ) as stream:
        assert "".join(stream.text_stream)
    step("messages any call, strict, streamed")
    with client.messages.stream(
        **OPTIONS,
        messages=ASK_WEATHER,
        tools=[{**tool, "strict": True} for tool in TOOLS],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert "input_json" in kinds, kinds
    (call,) = [block for block in final.content if block.type == "tool_use"]
    FUNCTIONS[call.name].model_validate(call.input)


def runner(client: anthropic.Anthropic) -> None:
    towns = []

    @anthropic.beta_tool
    def weather(town: str) -> str:
        """The weather in a town.

        Args:
            town: Its name.
        """
        towns.append(town)
        return RESULT

    step("messages tool runner")
    answers = list(
        client.beta.messages.tool_runner(
            **OPTIONS,
            messages=ASK_WEATHER,
            tools=[weather],
            tool_choice={"type": "tool", "name": "weather"},
            max_iterations=2,
        )
    )
    assert len(answers) == 2 and towns, answers


with anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0) as client:
    structure(client)
    tools(client)
    runner(client)
