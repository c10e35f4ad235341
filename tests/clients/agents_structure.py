"""openai-agents over chat completions and over responses: output of a type, a loop of calls."""

import asyncio
from typing import Annotated, Literal

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from pydantic import Field
from task import KEY, MAX_TOKENS, MODEL, QUESTION, RESULT, URL, WEATHER_QUESTION, Person, step

set_tracing_disabled(True)
called: list[str] = []


@function_tool
def get_weather(town: Annotated[str, Field(max_length=12)], unit: Literal["c", "f"]) -> str:
    """The weather in a town."""
    called.append(town)
    return RESULT


async def run(agent: Agent, asked: object, *, is_streamed: bool):
    """The run of an agent to its end."""
    if not is_streamed:
        return await Runner.run(agent, asked, max_turns=2)
    result = Runner.run_streamed(agent, asked, max_turns=2)
    async for _ in result.stream_events():
        pass
    return result


async def check(name: str, model: object, *, is_streamed: bool) -> None:
    end = ", streamed" if is_streamed else ""

    def settings(**options) -> ModelSettings:
        return ModelSettings(temperature=0, store=False, **options)

    person = Agent(
        name="person",
        model=model,
        output_type=Person,
        model_settings=settings(max_tokens=MAX_TOKENS),
    )
    step(f"{name} output type{end}")
    assert isinstance((await run(person, QUESTION, is_streamed=is_streamed)).final_output, Person)
    forced = Agent(
        name="forced",
        model=model,
        tools=[get_weather],
        tool_use_behavior="stop_on_first_tool",
        model_settings=settings(max_tokens=MAX_TOKENS, tool_choice="get_weather"),
    )
    step(f"{name} named call{end}")
    called.clear()
    first = await run(forced, WEATHER_QUESTION, is_streamed=is_streamed)
    assert called and first.final_output == RESULT, first
    # The package fails on an answer that is cut: a type keeps it short.
    silent = forced.clone(
        output_type=Person, model_settings=settings(max_tokens=MAX_TOKENS, tool_choice="none")
    )
    step(f"{name} answer to a result{end}")
    last = await run(silent, first.to_input_list(), is_streamed=is_streamed)
    assert isinstance(last.final_output, Person) and len(called) == 1, last


async def main() -> None:
    client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
    models = {
        "chat": OpenAIChatCompletionsModel(MODEL, client),
        "responses": OpenAIResponsesModel(MODEL, client),
    }
    for is_streamed in (False, True):
        for name, model in models.items():
            await check(name, model, is_streamed=is_streamed)


asyncio.run(main())
