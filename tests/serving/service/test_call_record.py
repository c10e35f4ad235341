"""Calls as metrics and spans tell of them: gateway and gRPC service around a real toy engine."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

import mixtral_jax
from mixtral_jax.tokenization.tokenizer import Tokenizer
from serving.access.credentials import Access
from serving.access.keyring import Keyring
from serving.engine.build import compile_steps, engine_of
from serving.engine.metrics import Metrics
from serving.engine.worker import EngineWorker
from serving.gateway.app import create_app
from serving.observe.tracing import Traces
from serving.proto import inference_pb2 as pb
from serving.scheduling.step_plan import Limits
from serving.service.call_record import Calls
from serving.service.service import InferenceService, create_server
from tests.support.fakes import gateway_config

PATIENCE = 10.0
STEP = 32  # tokens
LIMITS = Limits(
    num_pages=99,
    page_size=16,
    max_sequences=4,
    max_step_tokens=STEP,
    max_context=512,
    max_waiting=9,
    prefix_reuse=False,
)


class Toy:
    """A running engine and what it tells."""

    def __init__(self) -> None:
        model, self.tokenizer = mixtral_jax.load("tiny-random", mesh=None)
        self.metrics = Metrics("toy")
        engine = engine_of(model, LIMITS, compile_steps(model, LIMITS, has_masks=False))
        self.worker = EngineWorker(engine, self.metrics)
        self.worker.start()
        self.exporters: list[InMemorySpanExporter] = []  # of the test's processes

    def traces(self) -> Traces:
        """For one process."""
        provider = TracerProvider(shutdown_on_exit=False)
        self.exporters.append(InMemorySpanExporter())
        provider.add_span_processor(SimpleSpanProcessor(self.exporters[-1]))
        return Traces(provider)

    def ended(self) -> dict[str, float]:
        """Choices that have ended, by reason."""
        return {
            sample.labels["finished_reason"]: sample.value
            for family in text_string_to_metric_families(
                generate_latest(self.metrics.registry).decode()
            )
            for sample in family.samples
            if sample.name == "vllm:request_success_total"
        }

    def spans(self) -> dict[str, ReadableSpan]:
        return {
            span.name: span for exporter in self.exporters for span in exporter.get_finished_spans()
        }


@pytest.fixture(scope="module")
def shared() -> Iterator[Toy]:
    toy = Toy()
    yield toy
    toy.worker.stop()


@pytest.fixture
def toy(shared: Toy) -> Toy:
    shared.exporters.clear()
    return shared


@asynccontextmanager
async def endpoint(toy: Toy) -> AsyncIterator[httpx.AsyncClient]:
    """The gateway before the service, both in this loop, and a client of it."""
    access = Access(Keyring({"default": "secret", "gateway": "gateway's"}))
    info = pb.ModelInfo(name="toy", type="chat-completions", max_context=512, vocab_size=261)
    tokenizer: Tokenizer = toy.tokenizer
    calls = Calls(toy.metrics, toy.traces())
    service = InferenceService(toy.worker, tokenizer, info, calls)
    server, port, _ = await create_server("127.0.0.1:0", service, access)
    config = gateway_config(target=(f"127.0.0.1:{port}",), gateway_key="gateway's")
    app = create_app(config, access, traces=toy.traces())
    listener = socket.create_server(("127.0.0.1", 0))
    web = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="warning", ws="none"))
    running = asyncio.create_task(web.serve(sockets=[listener]))
    while not web.started:
        await asyncio.sleep(0.01)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    headers = {"authorization": "Bearer secret"}
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=PATIENCE, trust_env=False
    ) as client:
        yield client
    web.should_exit = True
    await running
    await server.stop(0)


def chat(text: str, **parameters: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": text}], "ignore_eos": True}
    return asked | parameters


def run(toy: Toy, work: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with endpoint(toy) as client:
            await asyncio.wait_for(work(client), PATIENCE)

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(("n", "decode_steps"), [(1, 4), (3, 5)])
def test_a_trace_from_http_to_engine_steps(toy: Toy, n: int, decode_steps: int) -> None:
    """A fork computes the prompt's last token again, to draw a first token of its own: 5 steps."""
    before = toy.ended()

    async def work(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/chat/completions", json=chat("x" * 90, max_tokens=5, n=n))
        usage = answer.json()["usage"]
        assert usage["completion_tokens"] == 5 * n
        await until(lambda: len(toy.spans()) == 7)
        spans = toy.spans()
        names = ["POST /v1/chat/completions", "chat toy", "mixtral.v1.Inference/Generate"]
        chain = [spans[name] for name in names]
        for upper, lower in zip(chain, chain[1:], strict=False):
            assert upper.context and lower.parent
            assert lower.parent.span_id == upper.context.span_id
        rpc = chain[-1]
        assert rpc.context and rpc.kind.name == "SERVER"
        assert dict(rpc.attributes or {}) == {
            "rpc.system": "grpc",
            "rpc.service": "mixtral.v1.Inference",
            "rpc.method": "Generate",
            "mixtral.request.id": answer.headers["x-request-id"],
            "gen_ai.usage.input_tokens": usage["prompt_tokens"],
            "gen_ai.usage.output_tokens": 5 * n,
        }
        parts = [spans[name] for name in ("render", "queue", "prefill", "decode")]
        for part in parts:
            assert part.parent and part.parent.span_id == rpc.context.span_id
            assert (part.end_time or 0) >= (part.start_time or 0)
        for one, next_one in zip(parts, parts[1:], strict=False):
            assert one.end_time == next_one.start_time
        prefill_steps = -(-usage["prompt_tokens"] // STEP)
        assert prefill_steps > 1
        assert dict(spans["prefill"].attributes or {}) == {"mixtral.engine.steps": prefill_steps}
        assert dict(spans["decode"].attributes or {}) == {"mixtral.engine.steps": decode_steps}

    run(toy, work)
    assert toy.ended() == before | {"length": before["length"] + n}


def test_a_stop_text_is_a_stop(toy: Toy) -> None:
    before = toy.ended()

    async def work(client: httpx.AsyncClient) -> None:
        free = await client.post("/v1/chat/completions", json=chat("x", max_tokens=20, seed=1))
        text = free.json()["choices"][0]["message"]["content"]
        body = chat("x", max_tokens=20, seed=1, stop=text[2:4])
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.json()["choices"][0]["finish_reason"] == "stop"

    run(toy, work)
    expected = {"length": before["length"] + 1, "stop": before["stop"] + 1}
    assert toy.ended() == before | expected


def test_a_stop_text_on_the_last_token_is_a_stop(toy: Toy) -> None:
    """In the metrics as in the answer."""
    before = toy.ended()

    async def work(client: httpx.AsyncClient) -> None:
        body = chat("x", max_tokens=6, seed=1, ignore_eos=True)
        body["logit_bias"] = {"65": 100}  # "A", of the byte tokenizer
        free = await client.post("/v1/chat/completions", json=body)
        assert free.json()["choices"][0]["message"]["content"] == "AAAAAA"
        answer = await client.post("/v1/chat/completions", json={**body, "stop": "AAAAAA"})
        (choice,) = answer.json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")

    run(toy, work)
    expected = {"length": before["length"] + 1, "stop": before["stop"] + 1}
    assert toy.ended() == before | expected


def test_a_dropped_call_is_an_abort(toy: Toy) -> None:
    before = toy.ended()

    async def work(client: httpx.AsyncClient) -> None:
        body = chat("x", max_tokens=400, n=2, stream=True)
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for _ in response.aiter_bytes():
                break
        await until(lambda: toy.ended()["abort"] == before["abort"] + 2)
        await until(lambda: "mixtral.v1.Inference/Generate" in toy.spans())
        rpc = toy.spans()["mixtral.v1.Inference/Generate"]
        assert (rpc.attributes or {})["error.type"] == "cancelled"

    run(toy, work)
    assert toy.ended() == before | {"abort": before["abort"] + 2}


def test_a_refused_call_is_none_that_ended(toy: Toy) -> None:
    before = toy.ended()

    async def work(client: httpx.AsyncClient) -> None:
        # The gateway lets as many bytes pass as the context has tokens; with the chat's own tokens
        # they are too many, which the service finds.
        answer = await client.post("/v1/chat/completions", json=chat("x" * 512))
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        await until(lambda: len(toy.spans()) >= 3)
        rpc = toy.spans()["mixtral.v1.Inference/Generate"]
        assert (rpc.attributes or {})["error.type"] == "ContextTooLong"

    run(toy, work)
    assert toy.ended() == before
