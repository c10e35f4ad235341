"""Loops of calls that the model decides on, by openai's client through the gateway.

The model is one of Mistral's third format whose draws are written here, the service and its engine
are the real ones.
"""

import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import openai
import pytest

from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.structure.trial import process
from mixtral_jax.tokenization.mistral import MistralTokenizer
from serving.access.credentials import Access
from serving.access.keyring import Keyring
from serving.engine.engine import Engine
from serving.engine.grammars import Grammars
from serving.engine.metrics import Metrics
from serving.engine.worker import EngineWorker
from serving.proto import inference_pb2 as pb
from serving.scheduling.step_plan import Limits
from serving.service.service import InferenceService, create_server
from tests.support.fakes import KEY, Stack, running_stack
from tests.support.tokenizers import MISTRAL_FILES
from tests.support.writing_device import WritingDevice

LIMITS = Limits(
    num_pages=512,
    page_size=16,
    max_sequences=4,
    max_step_tokens=256,
    max_context=2048,
    max_waiting=8,
)
TOOL_CALLS = 5  # [TOOL_CALLS] in Mistral's third vocabulary
WEATHER = {
    "type": "object",
    "properties": {"town": {"type": "string", "maxLength": 20}, "unit": {"enum": ["c", "f"]}},
    "required": ["town", "unit"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}},
]


class Model:
    """What the model wants to write, by what stands last in its prompt."""

    def __init__(self, tokenizer: MistralTokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, prompt: Sequence[int]) -> list[int]:
        text = self._tokenizer.decode([i for i in prompt if i > 9])
        (eos,) = self._tokenizer.eos_ids
        if text.rstrip().endswith("Hello."):
            return [*self._ids("Good day."), eos]
        if "12 degrees" in text:
            return [*self._ids("It is 12 degrees in Paris."), eos]
        # A unit that the function does not know.
        call = '[{"name": "get_weather", "arguments": {"town": "Paris", "unit": "kelvin"}}]'
        return [TOOL_CALLS, *self._ids(call), eos]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)[1:]


@pytest.fixture(scope="module")
def tokenizer() -> MistralTokenizer:
    return MistralTokenizer(MISTRAL_FILES["v3"])


@pytest.fixture(scope="module")
def device(tokenizer: MistralTokenizer) -> WritingDevice:
    return WritingDevice(LIMITS, Model(tokenizer))


@pytest.fixture(scope="module")
def unhurried() -> Iterator[None]:
    """A busy machine may take seconds to try a grammar that it compiles in milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "LONGEST_TRIAL", 60.0)
        patch.setattr(process, "LONGEST_CHECK", 60.0)
        yield


@pytest.fixture(scope="module")
def stack(device: WritingDevice, tokenizer: MistralTokenizer, unhurried: None) -> Iterator[Stack]:
    size = tokenizer.vocab_size
    engine = Engine(device, LIMITS, masks=Grammars(-(-size // 32)))
    worker = EngineWorker(engine, Metrics("written"))
    info = pb.ModelInfo(
        name="written", type="chat-completions", max_context=LIMITS.max_context, vocab_size=size
    )

    @contextlib.asynccontextmanager
    async def inference() -> AsyncIterator[str]:
        service = InferenceService(worker, tokenizer, info, compiler=compiler)
        access = Access(Keyring({"gateway": KEY}))
        server, port, _ = await create_server("127.0.0.1:0", service, access)
        yield f"127.0.0.1:{port}"
        await server.stop(0)

    worker.start()
    with Compiler(tokenizer, size) as compiler, running_stack(inference=inference) as stack:
        yield stack
    worker.stop()


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, messages: list[Any], *, is_streamed: bool) -> Any:
    """The only choice of the answer to a chat in which the model decides."""
    options: dict[str, Any] = {
        "model": "written",
        "messages": messages,
        "tools": TOOLS,
        "parallel_tool_calls": False,
    }
    if not is_streamed:
        return client.chat.completions.create(**options).choices[0]
    # The helper of the stream wants functions to be strict; chunks are put together by hand.
    text, calls, reason = "", [], None
    for chunk in client.chat.completions.create(**options, stream=True):
        text += chunk.choices[0].delta.content or ""
        calls += chunk.choices[0].delta.tool_calls or []
        reason = chunk.choices[0].finish_reason or reason
    message = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [call.model_dump(exclude={"index"}) for call in calls]
    return openai.types.chat.chat_completion.Choice.model_validate(
        {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
    )


both = pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])


@both
def test_the_model_answers_where_it_wants_to(
    client: openai.OpenAI, device: WritingDevice, is_streamed: bool
) -> None:
    masked = device.num_masked
    choice = ask(client, [{"role": "user", "content": "Hello."}], is_streamed=is_streamed)
    assert choice.message.content == "Good day."
    assert choice.finish_reason == "stop" and not choice.message.tool_calls
    assert device.num_masked == masked, "a text was held to a grammar"


@both
def test_a_loop_of_calls_comes_to_its_end(
    client: openai.OpenAI, device: WritingDevice, is_streamed: bool
) -> None:
    talk: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    refused = device.num_refused
    choice = ask(client, talk, is_streamed=is_streamed)
    assert choice.finish_reason == "tool_calls" and choice.message.content == ""
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather" and len(call.id) == 9 and call.id.isalnum()
    # Where the model wanted a unit that the function does not know, it had to take one of its own.
    arguments = json.loads(call.function.arguments)
    assert arguments["town"] == "Paris" and arguments["unit"] in ("c", "f")
    assert device.num_refused > refused
    talk += [
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"},
    ]
    choice = ask(client, talk, is_streamed=is_streamed)
    assert choice.message.content == "It is 12 degrees in Paris."
    assert choice.finish_reason == "stop" and not choice.message.tool_calls


def test_no_call_is_drawn_where_the_client_wants_none(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(
        model="written",
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=TOOLS,
        tool_choice="none",
        max_tokens=12,
    ).choices[0]
    assert choice.message.content and not choice.message.tool_calls
    assert choice.finish_reason in ("stop", "length")


def test_a_result_without_its_call_is_named(client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "tool", "tool_call_id": "call_1", "content": "12 degrees"},
    ]
    with pytest.raises(openai.BadRequestError, match="which no message before it makes") as caught:
        ask(client, messages, is_streamed=False)
    assert caught.value.param == "messages[1].tool_call_id"
    items: list[Any] = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"type": "function_call_output", "call_id": "call_1", "output": "12 degrees"},
    ]
    with pytest.raises(openai.BadRequestError, match="which no message before it makes") as caught:
        client.responses.create(model="written", input=items, store=False)
    assert caught.value.param == "input"
