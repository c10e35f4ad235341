"""langchain-openai and langchain-mistralai: with_structured_output's three methods, bind_tools."""

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_mistralai import ChatMistralAI
from langchain_openai import ChatOpenAI
from task import (
    FUNCTIONS,
    KEY,
    MAX_TOKENS,
    MODEL,
    QUESTION,
    RESULT,
    TOOLS,
    URL,
    WEATHER_QUESTION,
    Person,
    step,
)


def check_structure(model, name: str, method: str, **options: object) -> None:
    step(f"{name} {method}{' strict' if options.get('strict') else ''}")
    structured = model.with_structured_output(
        Person, method=method, include_raw=method == "json_mode", **options
    )
    answer = structured.invoke(QUESTION)
    if method == "json_mode":
        # The method sends no schema: that it is an object is all that the wire promises.
        assert answer["raw"].content.lstrip()[0] == "{", answer
    else:
        assert isinstance(answer, Person), answer


def check_loop(model, name: str, forced: str) -> None:
    step(f"{name} {forced} call")
    question = HumanMessage(WEATHER_QUESTION)
    bound = model.bind_tools(TOOLS, tool_choice=forced)
    answer = bound.invoke([question])
    assert answer.tool_calls and not answer.invalid_tool_calls, answer
    for call in answer.tool_calls:
        FUNCTIONS[call["name"]].model_validate(call["args"])
    talk = [question, answer]
    talk += [ToolMessage(RESULT, tool_call_id=call["id"]) for call in answer.tool_calls]
    step(f"{name} answer to a result")
    silent = model.bind_tools(TOOLS, tool_choice="none")
    assert silent.invoke(talk).content
    step(f"{name} {forced} call, streamed")
    whole = None
    for chunk in bound.stream([question]):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls and not whole.invalid_tool_calls, whole
    for call in whole.tool_calls:
        FUNCTIONS[call["name"]].model_validate(call["args"])
    step(f"{name} answer to a result, streamed")
    assert "".join(chunk.content for chunk in silent.stream(talk))


openai = ChatOpenAI(
    base_url=f"{URL}/v1",
    api_key=KEY,
    model=MODEL,
    max_tokens=MAX_TOKENS,
    temperature=0,
    max_retries=0,
)
mistral = ChatMistralAI(
    endpoint=f"{URL}/v1", mistral_api_key=KEY, model=MODEL, max_tokens=MAX_TOKENS, temperature=0
)
for name, model in {"openai": openai, "mistral": mistral}.items():
    for method in ("json_schema", "function_calling", "json_mode"):
        check_structure(model, name, method)
    check_loop(model, name, "get_weather")
    check_loop(model, name, "any")
check_structure(openai, "openai", "function_calling", strict=True)
step("openai json_schema, streamed")
*_, last = openai.with_structured_output(Person, method="json_schema").stream(QUESTION)
assert isinstance(last, Person), last
