"""Logprobs and pieces of prompts over gRPC: in which chunks they come, and what they cost."""

import asyncio
from concurrent.futures import Future

import grpc
import pytest

import mixtral_jax
from mixtral_jax.tokenization.tokenizer import Tokenizer
from serving.accounting.answer_tokens import AnswerTokens
from serving.engine.worker import EngineWorker
from serving.proto import inference_pb2 as pb
from serving.scheduling.request import TokenScore
from serving.service.answer.prompt_scores import MAX_CHUNK_LOGPROBS, prompt_pieces, score_chunks
from serving.service.service import InferenceService
from tests.serving.service.test_service import collect, parts, serving

__all__ = ["parts"]
TEXT = "Say naïve things."
Parts = tuple[EngineWorker, Tokenizer]


def asking(**fields: object) -> pb.GenerateRequest:
    values: dict[str, object] = {"text": TEXT, "prompt_logprobs": 1, "max_tokens": 2}
    return pb.GenerateRequest(**{**values, **fields})  # type: ignore[arg-type]


def answered(parts: Parts, request: pb.GenerateRequest) -> list[pb.GenerateChunk]:
    async def run() -> list[pb.GenerateChunk]:
        async with serving(parts) as channel:
            return await collect(channel, request)

    return asyncio.run(run())


def test_all_but_the_first_token_have_logprobs_before_the_answer(parts: Parts) -> None:
    chunks = answered(parts, asking(return_prompt_pieces=True))
    ids = parts[1].encode(TEXT)
    told = [score for chunk in chunks for score in chunk.prompt_logprobs]
    assert [score.token_id for score in told] == ids[1:]
    assert [score.token for score in told] == [parts[1].token_bytes(token) for token in ids[1:]]
    assert all(score.rank >= 1 and score.logprob < 0 and len(score.top) == 1 for score in told)
    assert all((s.rank == 1) == (s.top[0].logprob == s.logprob) for s in told)
    assert b"".join(chunks[0].prompt_pieces).decode() == TEXT
    assert len(chunks[0].prompt_pieces) == len(ids)
    first = next(i for i, chunk in enumerate(chunks) if chunk.token_ids)
    assert not any(chunk.prompt_logprobs for chunk in chunks[first:])
    plain = answered(parts, pb.GenerateRequest(text=TEXT, max_tokens=2))
    assert not any(chunk.prompt_logprobs or chunk.prompt_pieces for chunk in plain)


def test_nothing_is_generated_and_the_prompt_is_charged(parts: Parts) -> None:
    tokens, size = AnswerTokens(), len(parts[1].encode(TEXT))
    chunks = answered(parts, asking(max_tokens=0, n=2))
    for chunk in chunks:
        tokens.add(chunk)
    assert sum(len(chunk.prompt_logprobs) for chunk in chunks) == size - 1
    assert not any(chunk.text or chunk.token_ids for chunk in chunks)
    assert tokens.finish_reasons == ["length", "length"]
    assert chunks[-1].usage == pb.Usage(prompt_tokens=size)
    assert (tokens.computed_prompt_tokens, tokens.completion_tokens) == (size, 0)


def test_where_nothing_is_computed_nothing_is_charged(parts: Parts) -> None:
    request = pb.GenerateRequest(text=TEXT, max_tokens=0, return_prompt_pieces=True)
    tokens = AnswerTokens()
    chunks = answered(parts, request)
    for chunk in chunks:
        tokens.add(chunk)
    assert b"".join(chunks[0].prompt_pieces).decode() == TEXT
    assert chunks[-1].usage.prompt_tokens == len(parts[1].encode(TEXT))
    assert tokens.computed_prompt_tokens == 0


def test_max_tokens_0_asks_for_something(parts: Parts) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="ask for at least 1 token, or for the prompt"):
        answered(parts, pb.GenerateRequest(text=TEXT, max_tokens=0))


def test_programs_are_prepared_before_the_first_request_that_needs_them(parts: Parts) -> None:
    asked: list[str] = []

    def prepare() -> "Future[None]":
        asked.append("scores")
        done = Future[None]()
        done.set_result(None)
        return done

    info = pb.ModelInfo(name="toy", max_context=512, vocab_size=261)
    service = InferenceService(*parts, info, prepare_scores=prepare)

    async def run(request: pb.GenerateRequest) -> None:
        call = service._calls.begin("Inference", "Generate", {})
        async for _ in service._generate(request, None, call):
            pass
        call.close()

    asyncio.run(run(pb.GenerateRequest(text=TEXT, max_tokens=1)))
    assert asked == []
    asyncio.run(run(asking()))
    assert asked == ["scores"]


@pytest.mark.parametrize(("top", "size"), [(0, 1024), (1, 512), (20, 48)])
def test_a_chunk_holds_a_bounded_number_of_logprobs(top: int, size: int) -> None:
    tokenizer = mixtral_jax.load("tiny-random", mesh=None)[1]
    assert tokenizer is not None
    likely = tuple((token, -1.0) for token in range(top))
    scores = [TokenScore(token_id=9, logprob=-2.0, rank=3, top_logprobs=likely)] * (size + 1)
    first, last = score_chunks(scores, tokenizer)
    assert (len(first), len(last)) == (size, 1)
    assert sum(1 + len(score.top) for score in first) <= MAX_CHUNK_LOGPROBS


def test_a_space_that_the_tokenizer_adds_is_no_piece() -> None:
    class Spaced:
        dummy_space = True

        def token_bytes(self, token: int) -> bytes:
            return [b"", b" Hello", b" you"][token]

    pieces = prompt_pieces((0, 1, 2), Spaced())  # type: ignore[arg-type]
    assert pieces == [b"", b"Hello", b" you"]
