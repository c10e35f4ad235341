"""The gRPC service: proto on one side, the engine's worker on the other.

A request is checked and rendered to token ids (read_request.py), and the tokens of each of its
choices become text, which stop texts may end (choice_text.py).
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from mixtral_jax.tokenization.tokenizer import Tokenizer
from serving.access.credentials import Access
from serving.access.tls import ServerTls
from serving.accounting.caller_fields import CallerFields
from serving.engine.worker import EngineWorker
from serving.errors import ServingError
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc as rpc
from serving.scheduling.request import FinishReason
from serving.service.call_record import Call, Calls
from serving.service.choice_text import Choice
from serving.service.interceptor import AccessInterceptor
from serving.service.read_request import Translator
from serving.service.reflection import add_reflection
from serving.service.refusal import abort

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_OPTIONS = (
    # Without this, two servers could share a port and each would get half of the requests.
    ("grpc.so_reuseport", 0),
    # Tokens of users who are in many groups are longer than the default allows.
    ("grpc.max_metadata_size", 32 * 2**10),
    # Twice the size that the gateway accepts of a body.
    ("grpc.max_receive_message_length", 8 * 2**20),
    # A client whose machine is lost closes no connection, so the server pings.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    # Clients may ping too, also while they have no call (serving/channel.py).
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Otherwise gRPC counts these pings and closes an idle gateway's connection as abuse, and the
    # next request fails.
    ("grpc.http2.max_ping_strikes", 0),
)
_Request = TypeVar("_Request")
_Answer = TypeVar("_Answer")


class InferenceService(rpc.InferenceServicer):
    """Answers `mixtral.v1.Inference`."""

    def __init__(
        self,
        worker: EngineWorker,
        tokenizer: Tokenizer,
        info: pb.ModelInfo,
        calls: Calls | None = None,
    ) -> None:
        self._calls = calls or Calls()
        self._worker = worker
        self._tokenizer = tokenizer
        self._info = info
        self._translator = Translator(tokenizer, info)
        self.was_told_to_end = asyncio.Event()  # by Drain

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelInfo:
        """Returns the model's name and sizes."""
        return self._info

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateChunk]:
        """Streams the answer to one request."""
        metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        call = self._calls.begin(SERVICE_NAME, "Generate", metadata)
        try:
            async with aclosing(self._generate(request, context.time_remaining(), call)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except ServingError as error:
            call.fail(error)
            await abort(context, error)
        finally:
            call.close()

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.Tokens:
        """Returns the token ids that Generate would read."""
        return await _answer(self._translator.tokens, request, context)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.Text:
        """Returns the text that Generate would write for token ids."""
        return await _answer(self._translator.text, request, context)

    async def Drain(
        self, request: pb.DrainRequest, context: grpc.aio.ServicerContext
    ) -> pb.DrainReply:
        """Refuses later requests, and asks the process to end once the running ones have ended."""
        running = self._worker.num_under_way
        self._worker.drain()
        self.was_told_to_end.set()
        return pb.DrainReply(running=running)

    async def _generate(
        self, message: pb.GenerateRequest, seconds: float | None, call: Call
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        # In a thread: a template or a long prompt takes milliseconds, and other streams go on.
        request = await asyncio.to_thread(self._translator.request, message, seconds)
        continues = message.WhichOneof("prompt") != "chat" or message.chat.continue_last
        choices = [
            Choice(index, self._tokenizer, message.stop, continues=continues)
            for index in range(request.n)
        ]
        usage = pb.Usage(prompt_tokens=len(request.prompt_ids))
        is_first = True
        call.submitted(request)
        async with aclosing(self._worker.submit(request)) as events:
            async for event in events:
                choice = choices[event.choice]
                if choice.has_ended:  # by a stop text, which reaches the engine a little later
                    continue
                usage.completion_tokens += 1
                call.note(event)
                chunk = choice.push(event)
                if choice.has_ended:
                    call.ended(event.choice, event.finish_reason or FinishReason.STOP)
                is_last = all(choice.has_ended for choice in choices)
                if chunk is not None:
                    if is_first:
                        chunk.prompt_tokens, is_first = usage.prompt_tokens, False
                    if is_last:
                        chunk.usage.CopyFrom(usage)
                    yield chunk
                if is_last:
                    return  # which cancels what the engine still does
                if choice.has_ended and event.finish_reason is None:
                    self._worker.end(request.id, event.choice)


async def _answer(
    work: Callable[[_Request], _Answer], request: _Request, context: grpc.aio.ServicerContext
) -> _Answer:
    """Returns `work(request)`, computed in a thread, or ends the call with its error."""
    try:
        return await asyncio.to_thread(work, request)
    except ServingError as error:
        await abort(context, error)


async def create_server(
    address: str,
    service: InferenceService,
    access: Access,
    tls: ServerTls | None = None,
    fields: CallerFields | None = None,
) -> tuple[grpc.aio.Server, int, HealthServicer]:
    """A started server on `address` (port 0 chooses one): (server, port, health), SERVING.

    `fields` writes who asks into the calls of those who ask it directly. Raises OSError if the
    address is taken.
    """
    server = grpc.aio.server(
        interceptors=[AccessInterceptor(access, {f"/{SERVICE_NAME}/Drain"}, fields)],
        options=_OPTIONS,
    )
    rpc.add_InferenceServicer_to_server(service, server)
    checks = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    add_reflection((SERVICE_NAME, health.SERVICE_NAME), server)
    try:
        if tls is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, tls.credentials())
    except RuntimeError:
        raise OSError(f"cannot listen on {address}; is another server running there?") from None
    await server.start()
    await set_serving(checks, True)
    return server, port, checks


async def set_serving(checks: HealthServicer, serving: bool) -> None:
    """Sets the answer of grpc.health.v1 for the server as a whole and for Inference."""
    status = (
        health_pb2.HealthCheckResponse.SERVING
        if serving
        else health_pb2.HealthCheckResponse.NOT_SERVING
    )
    for name in ("", SERVICE_NAME):
        await checks.set(name, status)
