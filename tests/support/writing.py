"""A model service that writes given pieces of text, and notes when each was sent."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from serving.proto import inference_pb2, inference_pb2_grpc
from tests.support.fakes import SERVER_OPTIONS, ScriptedInference


class WritingInference(ScriptedInference):
    """Answers every chat with `pieces`, a token each, `pause` seconds apart.

    The token at place i has the logprob -0.1 * (i % 20), and as alternatives itself and "other".
    """

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.pause = 0.0
        self.sent: list[float] = []
        """Seconds since 1970 at which each piece was given to gRPC."""

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        """Writes the pieces at their times, which do not drift."""
        self.requests.append(request)
        self.sent.clear()
        started = time.monotonic()
        yield inference_pb2.GenerateChunk(prompt_tokens=1, adapter="")
        for i, piece in enumerate(self.pieces):
            if self.pause:
                await asyncio.sleep(max(0.0, started + i * self.pause - time.monotonic()))
            chunk = inference_pb2.GenerateChunk(text=piece, token_ids=[i])
            if request.HasField("top_logprobs"):
                chunk.logprobs.append(_logprob(piece, i, request.top_logprobs))
            self.sent.append(time.time())
            yield chunk
        last = inference_pb2.GenerateChunk(finish_reason=inference_pb2.FINISH_REASON_STOP)
        last.usage.prompt_tokens, last.usage.completion_tokens = 1, len(self.pieces)
        yield last


def _logprob(piece: str, place: int, count: int) -> inference_pb2.TokenLogprob:
    value = -0.1 * (place % 20)
    texts = [(piece, value), *((" other", -3.0 - i) for i in range(count - 1))]
    top = [
        inference_pb2.TokenLogprob(token_id=i, token=text.encode(), logprob=logprob)
        for i, (text, logprob) in enumerate(texts)
    ]
    return inference_pb2.TokenLogprob(
        token_id=place, token=piece.encode(), logprob=value, top=top[:count]
    )


class Writer:
    """Makes a service for `running_stack(inference=...)`, and holds it while it runs."""

    service: WritingInference

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[str]:
        """Yields the target of the service."""
        self.service = WritingInference()
        server = grpc.aio.server(options=SERVER_OPTIONS)
        inference_pb2_grpc.add_InferenceServicer_to_server(self.service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(0)
