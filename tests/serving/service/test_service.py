"""A real gRPC server around a real engine with a toy model."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import mixtral_jax
from mixtral_jax.tokenization.tokenizer import Tokenizer
from serving.access.credentials import Access
from serving.access.keyring import Keyring
from serving.engine.build import compile_steps, engine_of
from serving.engine.metrics import Metrics
from serving.engine.worker import EngineWorker
from serving.errors import ERROR_METADATA, DeadlineExceeded
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc as rpc
from serving.scheduling.step_plan import Limits
from serving.service.call_record import Calls
from serving.service.service import InferenceService, create_server

KEY = (("authorization", "Bearer secret"),)
ACCESS = Access(Keyring({"default": "secret"}))
LIMITS = Limits(
    num_pages=64, page_size=16, max_sequences=2, max_step_tokens=32, max_context=512, max_waiting=2
)


@pytest.fixture(scope="module")
def parts() -> Iterator[tuple[EngineWorker, Tokenizer]]:
    model, tokenizer = mixtral_jax.load("tiny-random", mesh=None)
    engine = engine_of(model, LIMITS, compile_steps(model, LIMITS, has_masks=False))
    worker = EngineWorker(engine, Metrics("tiny"))
    worker.start()
    yield worker, tokenizer
    worker.stop()


@asynccontextmanager
async def serving(parts: tuple[EngineWorker, Tokenizer]) -> AsyncIterator[grpc.aio.Channel]:
    info = pb.ModelInfo(name="toy", type="chat-completions", max_context=512, vocab_size=261)
    service = InferenceService(*parts, info)
    server, port, _ = await create_server("127.0.0.1:0", service, ACCESS)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


def chat(**fields: object) -> pb.GenerateRequest:
    messages = [pb.ChatMessage(role="user", content="hello")]
    return pb.GenerateRequest(chat=pb.Chat(messages=messages), **fields)


async def collect(channel: grpc.aio.Channel, request: pb.GenerateRequest) -> list[pb.GenerateChunk]:
    return [chunk async for chunk in rpc.InferenceStub(channel).Generate(request, metadata=KEY)]


def test_a_stream_adds_up_and_a_seed_repeats_it(parts: tuple[EngineWorker, Tokenizer]) -> None:
    async def run() -> None:
        async with serving(parts) as channel:
            request = chat(max_tokens=12, sampling=pb.SamplingParams(seed=3))
            chunks = await collect(channel, request)
            ids = [i for chunk in chunks for i in chunk.token_ids]
            prompt = len(parts[1].chat([{"role": "user", "content": "hello"}]))
            assert len(ids) == 12 or ids[-1] in parts[1].eos_ids
            assert "".join(chunk.text for chunk in chunks) == parts[1].decode(ids)
            assert [c.finish_reason for c in chunks[:-1]] == [0] * (len(chunks) - 1)
            reason = pb.FINISH_REASON_LENGTH if len(ids) == 12 else pb.FINISH_REASON_STOP
            assert chunks[-1].finish_reason == reason
            assert chunks[-1].usage == pb.Usage(prompt_tokens=prompt, completion_tokens=len(ids))
            again = await collect(channel, request)
            assert [i for chunk in again for i in chunk.token_ids] == ids

    asyncio.run(run())


def test_a_request_names_the_model_or_nobody(parts: tuple[EngineWorker, Tokenizer]) -> None:
    async def run() -> None:
        async with serving(parts) as channel:
            chunks = await collect(channel, chat(max_tokens=1, model="toy"))
            assert chunks[0].HasField("adapter") and chunks[0].adapter == ""
            assert not any(chunk.HasField("adapter") for chunk in chunks[1:])
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await collect(channel, chat(max_tokens=1, model="no-such-model"))
            assert failed.value.code() is grpc.StatusCode.NOT_FOUND
            assert "'no-such-model'" in (failed.value.details() or "")
            trailing = dict(failed.value.trailing_metadata() or ())
            assert trailing[ERROR_METADATA] == "ModelNotFound"
            info = await rpc.InferenceStub(channel).GetModelInfo(
                pb.GetModelInfoRequest(), metadata=KEY
            )
            assert not info.adapters

    asyncio.run(run())


def by_choice(chunks: list[pb.GenerateChunk]) -> dict[int, list[pb.GenerateChunk]]:
    found: dict[int, list[pb.GenerateChunk]] = {}
    for chunk in chunks:
        found.setdefault(chunk.choice, []).append(chunk)
    return found


def ids_of(chunks: list[pb.GenerateChunk]) -> list[int]:
    return [i for chunk in chunks for i in chunk.token_ids]


def test_each_choice_is_the_answer_to_its_own_seed(parts: tuple[EngineWorker, Tokenizer]) -> None:
    async def run() -> None:
        async with serving(parts) as channel:
            seeds = [7, 8, 9]
            alone = [
                await collect(channel, chat(max_tokens=9, sampling=pb.SamplingParams(seed=seed)))
                for seed in seeds
            ]
            sampling = pb.SamplingParams(seed=seeds[0])
            chunks = await collect(channel, chat(max_tokens=9, n=3, sampling=sampling))
            together = by_choice(chunks)
            assert [ids_of(together[choice]) for choice in range(3)] == [
                ids_of(chunks) for chunks in alone
            ]
            for own in together.values():
                *before, last = own
                assert last.finish_reason and not any(chunk.finish_reason for chunk in before)
            assert [chunk.HasField("usage") for chunk in chunks[:-1]] == [False] * (len(chunks) - 1)
            total = sum(len(ids_of(own)) for own in alone)
            prompt = alone[0][-1].usage.prompt_tokens
            assert chunks[-1].usage == pb.Usage(prompt_tokens=prompt, completion_tokens=total)

    asyncio.run(run())


def test_a_stop_text_ends_its_own_choice(parts: tuple[EngineWorker, Tokenizer]) -> None:
    async def run() -> None:
        async with serving(parts) as channel:
            asked = {"n": 2, "sampling": pb.SamplingParams(seed=3, temperature=2)}
            free = by_choice(await collect(channel, chat(max_tokens=60, ignore_eos=True, **asked)))
            texts = ["".join(chunk.text for chunk in free[choice]) for choice in range(2)]
            stop = next(c for c in texts[0] if texts[0].find(c) > 0 and c not in texts[1])
            request = chat(max_tokens=60, ignore_eos=True, stop=[stop], **asked)
            chunks = await collect(channel, request)
            cut, whole = by_choice(chunks).values()
            assert "".join(chunk.text for chunk in cut) == texts[0][: texts[0].find(stop)]
            assert cut[-1].finish_reason == pb.FINISH_REASON_STOP
            assert "".join(chunk.text for chunk in whole) == texts[1]
            assert whole[-1].finish_reason == pb.FINISH_REASON_LENGTH
            assert chunks[-1].usage.completion_tokens == len(ids_of(cut)) + 60

    asyncio.run(run())


def test_what_a_stop_text_ended_is_computed_no_more(
    parts: tuple[EngineWorker, Tokenizer],
) -> None:
    async def run() -> None:
        scheduler = parts[0]._engine.scheduler
        async with serving(parts) as channel:
            # The stop text is what choice 0 says and choice 1 never does.
            asked = {"n": 2, "sampling": pb.SamplingParams(seed=3, temperature=2)}
            free = by_choice(await collect(channel, chat(max_tokens=60, ignore_eos=True, **asked)))
            texts = ["".join(chunk.text for chunk in free[choice]) for choice in range(2)]
            stop = next(c for c in texts[0] if c not in texts[1])
            request = chat(max_tokens=60, ignore_eos=True, stop=[stop], **asked)
            before = scheduler.num_free_pages
            call = rpc.InferenceStub(channel).Generate(request, metadata=KEY)
            async for chunk in call:
                if chunk.choice == 0 and chunk.finish_reason:
                    break
            while scheduler.num_running == 2:
                await asyncio.sleep(0.005)
            left = [chunk async for chunk in call]
            assert {chunk.choice for chunk in left} <= {1}
            while scheduler.has_work:
                await asyncio.sleep(0.005)
            assert scheduler.num_free_pages == before

    asyncio.run(asyncio.wait_for(run(), 60))


def test_what_ends_an_answer(parts: tuple[EngineWorker, Tokenizer]) -> None:
    async def run() -> None:
        async with serving(parts) as channel:
            (eos,) = parts[1].eos_ids
            eager = pb.SamplingParams(temperature=0, logit_bias={eos: 100})
            chunks = await collect(channel, chat(max_tokens=9, sampling=eager))
            assert ids_of(chunks) == [eos]
            assert chunks[-1].finish_reason == pb.FINISH_REASON_STOP
            chunks = await collect(channel, chat(max_tokens=9, sampling=eager, min_tokens=4))
            assert len(ids_of(chunks)) == 5 and ids_of(chunks).index(eos) == 4
            chunks = await collect(channel, chat(max_tokens=9, sampling=eager, ignore_eos=True))
            assert ids_of(chunks) == [eos] * 9
            assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH
            likes = pb.SamplingParams(temperature=0, logit_bias={70: 100})
            stop = {"stop_token_ids": [70, 71], "ignore_eos": True, "sampling": likes}
            assert ids_of(await collect(channel, chat(max_tokens=9, **stop))) == [70]
            ids = ids_of(await collect(channel, chat(max_tokens=9, min_tokens=3, **stop)))
            assert len(ids) == 4 and ids.index(70) == 3

    asyncio.run(run())


def test_penalties_and_bounds_arrive(parts: tuple[EngineWorker, Tokenizer]) -> None:
    """Each against what it does by its definition, to an answer that would repeat itself."""

    async def run() -> None:
        async with serving(parts) as channel:

            async def ids(**sampling: object) -> list[int]:
                asked = pb.SamplingParams(**sampling)
                return ids_of(
                    await collect(channel, chat(max_tokens=8, ignore_eos=True, sampling=asked))
                )

            bias = {70: 91.0, 71: 90.0, 72: 89.9}
            assert await ids(temperature=0, logit_bias=bias) == [70] * 8
            assert set((await ids(temperature=0, logit_bias=bias, presence_penalty=2))[:2]) == {
                70,
                71,
            }
            assert len(set(await ids(temperature=0, logit_bias=bias, frequency_penalty=2))) == 3
            assert await ids(temperature=2, seed=1, top_k=1) == await ids(temperature=0)
            assert await ids(temperature=2, seed=1, min_p=1) == await ids(temperature=0)
            prompt = set(parts[1].chat([{"role": "user", "content": "hello"}]))
            assert not set(await ids(temperature=0)) <= prompt
            # A reward, in fact: a hundred times the logit of what is there already.
            assert set(await ids(temperature=0, repetition_penalty=0.01)) <= prompt

    asyncio.run(run())


def test_logprobs(parts: tuple[EngineWorker, Tokenizer]) -> None:
    async def run() -> None:
        async with serving(parts) as channel:
            greedy = {"max_tokens": 9, "sampling": pb.SamplingParams(temperature=0)}
            plain = await collect(channel, chat(**greedy))
            assert not any(chunk.logprobs for chunk in plain)
            for wanted in (0, 3):
                chunks = await collect(channel, chat(top_logprobs=wanted, **greedy))
                assert ids_of(chunks) == ids_of(plain)
                for chunk in chunks:
                    assert [one.token_id for one in chunk.logprobs] == list(chunk.token_ids)
                    for one in chunk.logprobs:
                        assert one.token == parts[1].token_bytes(one.token_id)
                        assert one.logprob < 0
                        assert len(one.top) == wanted
                        if wanted:
                            assert one.top[0].token_id == one.token_id
                            assert one.top[0].logprob == pytest.approx(one.logprob)
                            assert [top.logprob for top in one.top] == sorted(
                                (top.logprob for top in one.top), reverse=True
                            )

    asyncio.run(run())


def test_a_deadline_ends_the_call_and_frees_its_pages(
    parts: tuple[EngineWorker, Tokenizer],
) -> None:
    async def run() -> None:
        request = chat(max_tokens=400, ignore_eos=True)
        async with serving(parts) as channel:
            stub = rpc.InferenceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.Generate(request, metadata=KEY, timeout=0.2):
                    pass
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # The client stops waiting by its own clock; this is what the service would have told it.
        info = pb.ModelInfo(max_context=512, vocab_size=261)
        service = InferenceService(*parts, info)
        with pytest.raises(DeadlineExceeded, match="deadline passed"):
            async for _ in service._generate(request, 0.0, Calls().begin("", "", {})):
                pass
        scheduler = parts[0]._engine.scheduler
        while scheduler.has_work:
            await asyncio.sleep(0.01)
        assert scheduler.num_free_pages == LIMITS.num_pages

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_deadline_that_passes_in_the_queue_ends_there(
    parts: tuple[EngineWorker, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Slow steps: the two answers before it last for some ten seconds, unless they are cancelled.
    monkeypatch.setattr(parts[0]._engine, "on_step", lambda num_tokens: time.sleep(0.02))

    async def run() -> None:
        scheduler = parts[0]._engine.scheduler
        service = InferenceService(*parts, pb.ModelInfo(max_context=512, vocab_size=261))
        long = chat(max_tokens=450, ignore_eos=True)
        async with serving(parts) as channel:
            stub = rpc.InferenceStub(channel)
            running = [stub.Generate(long, metadata=KEY) for _ in range(LIMITS.max_sequences)]
            for call in running:
                while not (await call.read()).token_ids:
                    pass
            chunks = []
            # Another caller would be given a row of this one.
            late = chat(max_tokens=450, ignore_eos=True, caller="default")
            with pytest.raises(DeadlineExceeded, match="deadline passed"):
                async for chunk in service._generate(late, 0.05, Calls().begin("", "", {})):
                    chunks.append(chunk)
            # It had no row: nothing was computed for it, and it costs nothing.
            assert not any(chunk.token_ids or chunk.computed_tokens for chunk in chunks)
            assert (scheduler.num_running, scheduler.num_waiting) == (LIMITS.max_sequences, 0)
            for call in running:
                call.cancel()
        while scheduler.has_work:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_stop_text_ends_the_stream_before_it(parts: tuple[EngineWorker, Tokenizer]) -> None:
    async def run() -> None:
        async with serving(parts) as channel:
            sampling = pb.SamplingParams(temperature=0)
            whole = "".join(
                chunk.text
                for chunk in await collect(channel, chat(max_tokens=40, sampling=sampling))
            )
            stop = whole[5:7]
            chunks = await collect(channel, chat(max_tokens=40, sampling=sampling, stop=[stop]))
            assert "".join(chunk.text for chunk in chunks) == whole[: whole.find(stop)]
            assert chunks[-1].finish_reason == pb.FINISH_REASON_STOP

    asyncio.run(run())


@pytest.mark.parametrize(
    ("request_", "leaf", "text"),
    [
        (pb.GenerateRequest(), "InvalidRequest", "prompt is missing"),
        (chat(max_tokens=0), "InvalidParameter", "max_tokens is 0"),
        (chat(stop=[""]), "InvalidParameter", "empty text"),
        (chat(sampling=pb.SamplingParams(temperature=3)), "InvalidParameter", "temperature is 3"),
        (chat(sampling=pb.SamplingParams(top_p=-1)), "InvalidParameter", "top_p is -1"),
        (chat(sampling=pb.SamplingParams(min_p=2)), "InvalidParameter", "min_p is 2"),
        (
            chat(sampling=pb.SamplingParams(presence_penalty=3)),
            "InvalidParameter",
            "presence_penalty is 3; it must be within -2 and 2",
        ),
        (
            chat(sampling=pb.SamplingParams(frequency_penalty=float("nan"))),
            "InvalidParameter",
            "frequency_penalty is nan",
        ),
        (
            chat(sampling=pb.SamplingParams(repetition_penalty=0)),
            "InvalidParameter",
            "repetition_penalty is 0; it must be within 0.01 and 100",
        ),
        (
            chat(sampling=pb.SamplingParams(logit_bias={5: -101})),
            "InvalidParameter",
            "logit_bias of 5 is -101",
        ),
        (
            chat(sampling=pb.SamplingParams(logit_bias={261: 1})),
            "InvalidParameter",
            "logit_bias holds 261; ids are below 261",
        ),
        (
            chat(sampling=pb.SamplingParams(logit_bias=dict.fromkeys(range(301), 0.0))),
            "InvalidParameter",
            "logit_bias has 301 entries; give at most 300",
        ),
        (chat(top_logprobs=21), "InvalidParameter", "top_logprobs is 21"),
        (chat(n=0), "InvalidParameter", "n is 0; it must be within 1 and 16"),
        (chat(n=17), "InvalidParameter", "n is 17"),
        (chat(max_tokens=3, min_tokens=4), "InvalidParameter", "min_tokens is 4"),
        (chat(stop_token_ids=[261]), "InvalidParameter", "stop_token_ids holds 261"),
        (chat(stop_token_ids=range(17)), "InvalidParameter", "stop_token_ids has 17 ids"),
        (chat(allowed_token_ids=[5, 261]), "InvalidParameter", "allowed_token_ids holds 261"),
        (
            chat(allowed_token_ids=range(1025)),
            "InvalidParameter",
            "allowed_token_ids has 1,025 ids; give at most 1,024",
        ),
        (
            chat(allowed_token_ids=[70], stop_token_ids=[70], min_tokens=1),
            "InvalidParameter",
            "allowed_token_ids holds only ids that end an answer",
        ),
        (
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="king", content="x")])),
            "InvalidRequest",
            "role 'king'",
        ),
        (
            pb.GenerateRequest(
                chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="x" * 10_000)])
            ),
            "ContextTooLong",
            "512 tokens. However, content has 10,000 bytes",
        ),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[261])),
            "InvalidParameter",
            "token_ids holds 261; ids are below 261",
        ),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 600)),
            "ContextTooLong",
            "the prompt has 600 tokens",
        ),
    ],
)
def test_bad_requests(
    parts: tuple[EngineWorker, Tokenizer], request_: pb.GenerateRequest, leaf: str, text: str
) -> None:
    async def run() -> None:
        async with serving(parts) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await collect(channel, request_)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert dict(caught.value.trailing_metadata())[ERROR_METADATA] == leaf
            assert text in caught.value.details()

    asyncio.run(run())


def test_keys(parts: tuple[EngineWorker, Tokenizer]) -> None:
    async def run() -> None:
        async with serving(parts) as channel:
            stub = rpc.InferenceStub(channel)
            for metadata in ((), (("authorization", "Bearer wrong"),), (("api-key", ""),)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async for _ in stub.Generate(chat(), metadata=metadata):
                        pass
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            metadata = (("api-key", "secret"),)
            info = await stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata)
            assert info.name == "toy"
            # No text of more bytes fits: its tokens have 16 at most.
            longest = max(len(parts[1].token_bytes(i)) for i in range(parts[1].vocab_size))
            assert info.max_prompt_bytes == 512 * min(longest, 16)
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING

    asyncio.run(run())


def test_a_full_queue_is_refused_and_leaving_frees(parts: tuple[EngineWorker, Tokenizer]) -> None:
    """Two run and two wait; of twelve that come at once, some are refused. No page stays held."""

    async def run() -> None:
        async with serving(parts) as channel:
            stub = rpc.InferenceStub(channel)
            request = chat(max_tokens=400, sampling=pb.SamplingParams(temperature=0))
            calls = [stub.Generate(request, metadata=KEY) for _ in range(12)]
            first = await asyncio.gather(*(call.read() for call in calls), return_exceptions=True)
            refused = [item for item in first if isinstance(item, grpc.aio.AioRpcError)]
            assert refused
            assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            assert "are waiting already" in str(refused[0].details())
            assert len(refused) < len(first)
            for call in calls:
                call.cancel()
            scheduler = parts[0]._engine.scheduler
            while scheduler.has_work:
                await asyncio.sleep(0.01)
            assert scheduler.num_free_pages == LIMITS.num_pages

    asyncio.run(asyncio.wait_for(run(), 60))
