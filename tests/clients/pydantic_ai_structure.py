"""pydantic-ai: output by a tool, natively and by a prompt; an agent with functions."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic_ai import Agent, NativeOutput, PromptedOutput, UnexpectedModelBehavior
from pydantic_ai.direct import model_request_stream_sync, model_request_sync
from pydantic_ai.messages import ModelRequest, ToolReturnPart, UserPromptPart
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.tools import ToolDefinition
from task import (
    FUNCTIONS,
    KEY,
    MAX_TOKENS,
    MODEL,
    QUESTION,
    RESULT,
    URL,
    WEATHER_QUESTION,
    Person,
    check_call,
    step,
)

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY))
SETTINGS = {"max_tokens": MAX_TOKENS, "temperature": 0.0}

for name, output in {
    "tool output": Person,
    "NativeOutput": NativeOutput(Person),
    "PromptedOutput": PromptedOutput(Person),
}.items():
    agent = Agent(model, output_type=output, model_settings=SETTINGS, retries=0)
    step(name)
    try:
        assert isinstance(agent.run_sync(QUESTION).output, Person)
    except UnexpectedModelBehavior:
        # By a prompt the server is only asked for an object.
        assert name == "PromptedOutput", name


def prepared(context, definition):
    """Takes the function away once it has been called, so that the run comes to its end."""
    return None if called else definition


called: list[str] = []
weather = Agent(model, output_type=Person, model_settings=SETTINGS, retries=0)


@weather.tool_plain(prepare=prepared)
def get_weather(town: Annotated[str, Field(max_length=12)], unit: Literal["c", "f"]) -> str:
    """The weather in a town."""
    called.append(town)
    return RESULT


step("agent with a function and a type")
assert isinstance(weather.run_sync(WEATHER_QUESTION).output, Person)

DEFINITIONS = [
    ToolDefinition(
        name=name, description=kind.__doc__, parameters_json_schema=kind.model_json_schema()
    )
    for name, kind in FUNCTIONS.items()
]
PARAMETERS = ModelRequestParameters(function_tools=DEFINITIONS)
ASK = ModelRequest(parts=[UserPromptPart(WEATHER_QUESTION)])


def answered(messages: list, choice: object, *, is_streamed: bool):
    """The model's answer to the messages."""
    settings = {**SETTINGS, "tool_choice": choice}
    options = {"model_settings": settings, "model_request_parameters": PARAMETERS}
    if not is_streamed:
        return model_request_sync(model, messages, **options)
    with model_request_stream_sync(model, messages, **options) as stream:
        for _ in stream:
            pass
        return stream.response


for is_streamed in (False, True):
    for choice in (["get_weather"], "required"):
        end = ", streamed" if is_streamed else ""
        kind = choice if isinstance(choice, str) else "named"
        step(f"{kind} call{end}")
        answer = answered([ASK], choice, is_streamed=is_streamed)
        assert answer.tool_calls, answer
        for call in answer.tool_calls:
            check_call(call.tool_name, call.args_as_json_str())
        results = [
            ToolReturnPart(call.tool_name, RESULT, call.tool_call_id) for call in answer.tool_calls
        ]
        step(f"answer to the result of a {kind} call{end}")
        talk = [ASK, answer, ModelRequest(parts=results)]
        answer = answered(talk, "none", is_streamed=is_streamed)
        assert answer.text and not answer.tool_calls, answer
