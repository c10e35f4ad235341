"""The load: answers that are streamed over gRPC, many at once, and counted as they come."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import grpc

from serving.channel import INFERENCE
from serving.proto import inference_pb2 as pb

_WORDS = "What did the sea bring in the spring of the year in which the piano came ashore?"


@dataclass
class Seen:
    """Sums over the answers of a load."""

    tokens: int = 0
    chunks: int = 0  # with tokens
    seconds: float = 0.0


def _field(data: bytes, at: int) -> tuple[int, int]:
    """Returns the number that is written at a place of a message, and the place behind it."""
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return number, at
        shift += 7


def num_tokens(data: bytes) -> int:
    """Returns the number of token ids of a GenerateChunk's bytes.

    The load reads no more of it: it runs beside the service that it measures.
    """
    at = 0
    while at < len(data):
        tag, at = _field(data, at)
        if tag & 7 == 0:
            _, at = _field(data, at)
            continue
        if tag & 7 == 5:
            at += 4
            continue
        assert tag & 7 == 2, "a chunk has no other kinds of fields"
        size, at = _field(data, at)
        if tag >> 3 == pb.GenerateChunk.TOKEN_IDS_FIELD_NUMBER:
            return sum(byte < 0x80 for byte in data[at : at + size])
        at += size
    return 0


async def load(targets: Sequence[str], key: str, streams: int, tokens: int) -> Seen:
    """Asks for so many answers of so many tokens at once, and reads them all.

    The processes of the service, one for each target, are asked in turn.
    Raises AssertionError if an answer has not as many.
    """
    async with AsyncExitStack() as stack:
        generate = [
            (await stack.enter_async_context(grpc.aio.insecure_channel(target))).unary_stream(
                f"/{INFERENCE}/Generate",
                request_serializer=pb.GenerateRequest.SerializeToString,
                response_deserializer=bytes,
            )
            for target in targets
        ]
        seen = Seen()

        async def answer(number: int) -> None:
            request = pb.GenerateRequest(
                text=f"{number} {_WORDS}",
                max_tokens=tokens,
                ignore_eos=True,
                sampling=pb.SamplingParams(temperature=0.7),
                caller=f"caller{number % 8}",
            )
            own = 0
            call = generate[number % len(generate)]
            async for data in call(request, metadata=(("authorization", f"Bearer {key}"),)):
                if count := num_tokens(data):
                    own += count
                    seen.chunks += 1
            assert own == tokens, f"an answer has {own} tokens instead of {tokens}"
            seen.tokens += own

        began = time.perf_counter()
        await asyncio.gather(*map(answer, range(streams)))
        seen.seconds = time.perf_counter() - began
        return seen
