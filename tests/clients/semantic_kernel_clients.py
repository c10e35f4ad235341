"""Semantic Kernel: its connectors for OpenAI, Azure OpenAI and Azure AI Inference (https alone)."""

import asyncio
import os

from openai import AsyncOpenAI
from pydantic import BaseModel, Field
from semantic_kernel import Kernel
from semantic_kernel.connectors.ai.azure_ai_inference import (
    AzureAIInferenceChatCompletion,
    AzureAIInferenceChatPromptExecutionSettings,
)
from semantic_kernel.connectors.ai.function_choice_behavior import FunctionChoiceBehavior
from semantic_kernel.connectors.ai.open_ai import (
    AzureChatCompletion,
    AzureChatPromptExecutionSettings,
    OpenAIChatCompletion,
    OpenAIChatPromptExecutionSettings,
)
from semantic_kernel.contents import ChatHistory
from semantic_kernel.functions import kernel_function

URL, KEY, NAME = os.environ["ENDPOINT"], os.environ["KEY"], "azureai"


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)


class Clock:
    def __init__(self) -> None:
        self.calls = 0

    @kernel_function(description="Tells the time.")
    def time_now(self) -> str:
        self.calls += 1
        return "12:30"


def history() -> ChatHistory:
    asked = ChatHistory(system_message="You are brief.")
    asked.add_user_message("What time is it?")
    return asked


async def check(service, settings) -> None:
    answer = await service.get_chat_message_content(history(), settings(max_tokens=8))
    assert str(answer), answer
    pieces = [
        str(piece)
        async for piece in service.get_streaming_chat_message_content(
            history(), settings(max_tokens=8)
        )
    ]
    assert "".join(pieces), pieces
    for is_streamed in (False, True):
        clock, kernel = Clock(), Kernel()
        kernel.add_plugin(clock, "clock")
        options = settings(max_tokens=120)
        options.function_choice_behavior = FunctionChoiceBehavior.Required(auto_invoke=True)
        if is_streamed:
            answers = service.get_streaming_chat_message_content(history(), options, kernel=kernel)
            async for _ in answers:
                pass
        else:
            await service.get_chat_message_content(history(), options, kernel=kernel)
        assert clock.calls > 0


async def main() -> None:
    openai = OpenAIChatCompletion(
        service_id="openai",
        ai_model_id=NAME,
        async_client=AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0),
    )
    await check(openai, OpenAIChatPromptExecutionSettings)
    azure = AzureChatCompletion(
        service_id="azure",
        deployment_name=NAME,
        endpoint=URL,
        api_key=KEY,
        api_version="2024-10-21",
    )
    await check(azure, AzureChatPromptExecutionSettings)
    for service, settings in (
        (openai, OpenAIChatPromptExecutionSettings),
        (azure, AzureChatPromptExecutionSettings),
    ):
        typed = settings(max_tokens=100, response_format=Person)
        answer = await service.get_chat_message_content(history(), typed)
        Person.model_validate_json(str(answer))
    inference = AzureAIInferenceChatCompletion(
        service_id="inference", ai_model_id=NAME, endpoint=URL, api_key=KEY
    )
    await check(inference, AzureAIInferenceChatPromptExecutionSettings)


asyncio.run(main())
