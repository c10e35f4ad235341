"""azure-ai-inference: JSON, schemas and a loop of calls, whole and streamed."""

import os

from azure.ai.inference import ChatCompletionsClient
from azure.ai.inference.models import (
    AssistantMessage,
    ChatCompletionsNamedToolChoice,
    ChatCompletionsNamedToolChoiceFunction,
    ChatCompletionsToolCall,
    ChatCompletionsToolDefinition,
    FunctionCall,
    FunctionDefinition,
    JsonSchemaFormat,
    ToolMessage,
    UserMessage,
)
from azure.core.credentials import AzureKeyCredential
from task import (
    FUNCTIONS,
    KEY,
    MAX_TOKENS,
    QUESTION,
    RESULT,
    URL,
    WEATHER_QUESTION,
    Person,
    check_call,
    check_person,
    step,
)

TOOLS = [
    ChatCompletionsToolDefinition(
        function=FunctionDefinition(
            name=name, description=model.__doc__, parameters=model.model_json_schema()
        )
    )
    for name, model in FUNCTIONS.items()
]
NAMED = ChatCompletionsNamedToolChoice(
    function=ChatCompletionsNamedToolChoiceFunction(name="get_weather")
)


def structure(client: ChatCompletionsClient) -> None:
    options = {"messages": [UserMessage(QUESTION)], "max_tokens": MAX_TOKENS, "temperature": 0}
    shape = JsonSchemaFormat(
        name="person", schema=Person.model_json_schema(), description="A person.", strict=True
    )
    step("json_schema")
    answer = client.complete(**options, response_format=shape)
    person = check_person(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"
    step("json_schema, streamed")
    updates = client.complete(**options, response_format=shape, stream=True)
    text = "".join(update.choices[0].delta.content or "" for update in updates if update.choices)
    assert check_person(text) == person
    step("json_object")
    answer = client.complete(**{**options, "max_tokens": 40}, response_format="json_object")
    assert answer.choices[0].message.content.lstrip()[0] == "{"


def tools(client: ChatCompletionsClient) -> None:
    options = {"max_tokens": MAX_TOKENS, "temperature": 0, "tools": TOOLS}
    talk = [UserMessage(WEATHER_QUESTION)]
    step("named call")
    choice = client.complete(**options, messages=talk, tool_choice=NAMED).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.function.name == "get_weather"
    check_call(call.function.name, call.function.arguments)
    talk += [
        AssistantMessage(tool_calls=[call]),
        ToolMessage(content=RESULT, tool_call_id=call.id),
    ]
    step("answer to a result")
    answer = client.complete(**{**options, "max_tokens": 16}, messages=talk, tool_choice="none")
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls
    step("required call, streamed")
    arguments = name = id_ = ""
    for update in client.complete(
        **options, messages=talk[:1], tool_choice="required", stream=True
    ):
        for choice in update.choices:
            for piece in choice.delta.tool_calls or []:
                # Of several calls in one answer the first is taken.
                if piece.get("index", 0) == 0:
                    name += piece.function.name or ""
                    arguments += piece.function.arguments or ""
                    id_ += piece.id or ""
    check_call(name, arguments)
    call = ChatCompletionsToolCall(id=id_, function=FunctionCall(name=name, arguments=arguments))
    talk = [
        talk[0],
        AssistantMessage(tool_calls=[call]),
        ToolMessage(content=RESULT, tool_call_id=id_),
    ]
    step("answer to a result, streamed")
    text = "".join(
        update.choices[0].delta.content or ""
        for update in client.complete(
            **{**options, "max_tokens": 16}, messages=talk, tool_choice="none", stream=True
        )
        if update.choices
    )
    assert text


endpoint = os.environ.get("AZURE_INFERENCE_ENDPOINT", URL)
with ChatCompletionsClient(endpoint, AzureKeyCredential(KEY)) as client:
    structure(client)
    tools(client)
