"""langchain-mistralai and langchain-azure-ai (both of its chat models)."""

import asyncio
import os

import httpx
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError
from langchain_azure_ai.chat_models import AzureAIChatCompletionsModel as OverOpenAI
from langchain_azure_ai.chat_models.inference import AzureAIChatCompletionsModel as OverInference
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_mistralai import ChatMistralAI
from langchain_openai import AzureChatOpenAI, ChatOpenAI, OpenAI

URL, KEY = os.environ["ENDPOINT"], os.environ["KEY"]
HISTORY = [
    SystemMessage("You are brief."),
    HumanMessage("What is the capital of France?"),
    AIMessage("Paris."),
    HumanMessage("And of Italy?"),
]


def check_chat(model) -> None:
    answer = model.invoke(HISTORY)
    text = "".join(chunk.content for chunk in model.stream(HISTORY))
    assert text == answer.content, (text, answer.content)
    usage = answer.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0


def is_refused(call, *kinds: type[Exception]) -> Exception:
    try:
        call()
    except kinds as error:
        return error
    raise AssertionError("nothing was refused")


def mistral(**options) -> ChatMistralAI:
    return ChatMistralAI(endpoint=URL, mistral_api_key=KEY, max_tokens=8, **options)


check_chat(mistral(temperature=0))
# With these it sends more than Azure's API knows, and no header that says so.
mistral(random_seed=7, safe_mode=True).invoke(HISTORY)
batch = mistral(temperature=0).generate([HISTORY, HISTORY])
assert batch.llm_output["token_usage"]["total_tokens"] > 0
assert asyncio.run(mistral(temperature=0).ainvoke(HISTORY)).content is not None
check_chat(ChatMistralAI(endpoint=f"{URL}/v1", mistral_api_key=KEY, max_tokens=8, temperature=0))
wrong = ChatMistralAI(endpoint=URL, mistral_api_key="wrong")
assert "401" in str(is_refused(lambda: wrong.invoke(HISTORY), httpx.HTTPStatusError))
is_refused(lambda: mistral(model_kwargs={"n": 0}).invoke(HISTORY), httpx.HTTPStatusError)


def inference(**options) -> OverInference:
    return OverInference(endpoint=URL, credential=KEY, max_tokens=8, **options)


# Asks /info at construction, and does not send a temperature of 0.
check_chat(inference(temperature=0.5, model_kwargs={"seed": 7}))
extras = inference(model_kwargs={"logprobs": True, "n": 1}).invoke(HISTORY)
assert extras.content is not None
is_refused(lambda: inference(top_p=7.0).invoke(HISTORY), HttpResponseError)
is_refused(
    lambda: OverInference(endpoint=URL, credential="wrong").invoke(HISTORY),
    ClientAuthenticationError,
)

check_chat(OverOpenAI(endpoint=URL, credential=KEY, model="azureai", max_tokens=8, temperature=0))

# Twenty at once: as requests beside one another, and of texts as one request with all of them.
twenty = [f"Say {number}." for number in range(20)]
short = {"model": "azureai", "max_tokens": 2}
for batched in (
    ChatMistralAI(endpoint=f"{URL}/v1", mistral_api_key=KEY, **short),
    ChatOpenAI(base_url=f"{URL}/v1", api_key=KEY, **short),
    AzureChatOpenAI(azure_endpoint=URL, api_key=KEY, api_version="2024-10-21", **short),
    OverOpenAI(endpoint=f"{URL}/openai/v1", credential=KEY, **short),
    OpenAI(base_url=f"{URL}/v1", api_key=KEY, **short),
):
    assert len(batched.batch(twenty)) == 20
