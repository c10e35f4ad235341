"""The gRPC service: proto on one side, the engine's worker on the other.

A request is checked and rendered to token ids (read_request.py), and the tokens of each of its
choices become text, which stop texts may end (answer/).
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.tokenization.tokenizer import Tokenizer
from serving.access.credentials import Access
from serving.access.renewal import RenewedServerTls
from serving.access.tls import ServerTls
from serving.accounting.accounts import Accounts
from serving.accounting.admission import Admission
from serving.accounting.caller_fields import CallerFields
from serving.engine.submission import Submission, Uncomputed
from serving.errors import WEAKENED_METADATA, EngineFailure, Overloaded, ServingError
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc as rpc
from serving.scheduling.request import Request
from serving.service.answer.choice_text import AnswerText, Stops
from serving.service.answer.form import AnswerForm, header
from serving.service.answer.pace import EVERY_TOKEN, Pace
from serving.service.call_log import CallLog
from serving.service.call_record import Call, Calls
from serving.service.direct_calls import DirectCalls, turn_of
from serving.service.health_checks import MAX_HEALTH_CALLS, HealthCalls
from serving.service.interceptor import AccessInterceptor
from serving.service.models.served_models import ServedModels
from serving.service.open_calls import OpenCalls
from serving.service.read_request import BYTES_PER_TOKEN, Translator, continues
from serving.service.reflection import add_reflection
from serving.service.refusal import abort
from serving.service.turns import Turns
from serving.service.worker import Worker

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name
OPERATORS_ONLY = frozenset({f"/{SERVICE_NAME}/Drain", f"/{SERVICE_NAME}/GetMetrics"})
"""Methods that are for operators' keys and the gateway's."""
_OPTIONS = (
    # Tokens of users who are in many groups are longer than the default allows.
    ("grpc.max_metadata_size", 32 * 2**10),
    # A little more than the gateway accepts of a body. The parser works on the event loop.
    ("grpc.max_receive_message_length", 5 * 2**20),
    # The probe lets each call send megabytes ahead, whether anybody reads them or not; without it
    # they are 64 KiB, and a message that is being read.
    ("grpc.http2.bdp_probe", 0),
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
# Callers whose grammars are compiled at the same time, one of each. The compiler has fewer
# processes; a thread more serves grammars that it knows already.
_COMPILING_THREADS = 4
# Calls that a caller may have beyond what the engine can hold.
_SPARE_CALLS = 100
# Callers who may have as many calls at the same time, also through a gateway. Beyond them all gRPC
# refuses with RESOURCE_EXHAUSTED.
_FULL_CALLERS = 4
_log = logging.getLogger(__name__)


class InferenceService(rpc.InferenceServicer):
    """Answers `mixtral.v1.Inference`.

    Args:
        worker: Computes.
        tokenizer: That of the model.
        info: The model's name and sizes.
        calls: Records the calls.
        bytes_per_token: Most bytes of a prompt for each token of the context.
        compiler: Compiles what answers are held to; None refuses to hold them to anything.
        models: The names that requests may give; by default the model's own alone.
        prepare_scores: Begins, beside the engine's steps, to compile what logprobs of prompts need;
            what it returns is done when that is there. None leaves it to the first such step.
        pace: Says which tokens go out in one chunk.
        reads_predictions: Whether the engine guesses tokens from what answers may repeat.
    """

    def __init__(
        self,
        worker: Worker,
        tokenizer: Tokenizer,
        info: pb.ModelInfo,
        calls: Calls | None = None,
        bytes_per_token: int = BYTES_PER_TOKEN,
        compiler: Compiler | None = None,
        models: ServedModels | None = None,
        prepare_scores: Callable[[], "Future[None]"] | None = None,
        pace: Pace = EVERY_TOKEN,
        *,
        reads_predictions: bool = False,
    ) -> None:
        self._pace = pace
        self._prepare_scores = prepare_scores
        self._calls = calls or Calls()
        self._models = models or ServedModels(info.name)
        self._worker = worker
        self._tokenizer = tokenizer
        self._translator = Translator(
            tokenizer, info, bytes_per_token, compiler, reads_predictions=reads_predictions
        )
        self._info = pb.ModelInfo()
        self._info.CopyFrom(info)
        self._info.max_prompt_bytes = self._translator.prompt_bytes
        self._info.capabilities.extend(self._translator.capabilities)
        self._tokenizing = Turns()
        self._compiling = Turns(_COMPILING_THREADS, limit=1, name="compile")
        self.was_told_to_end = asyncio.Event()  # by Drain

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together that the model holds."""
        return self._info.max_context

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelInfo:
        """Returns the model's name and sizes, and its adapters."""
        info = pb.ModelInfo(adapters=self._models.listed())
        info.MergeFrom(self._info)
        return info

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateChunk]:
        """Streams the answer to one request."""
        metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        call = self._calls.begin(SERVICE_NAME, "Generate", metadata)
        try:
            begin = partial(_begin, context)
            answer = self._generate(request, context.time_remaining(), call, begin)
            async with aclosing(answer) as chunks:
                async for chunk in chunks:
                    yield chunk
        except Exception as error:
            failure = _failure(error)
            call.fail(failure)
            await abort(context, failure)
        finally:
            call.close()

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.Tokens:
        """Returns the token ids that Generate would read."""
        try:
            self._translator.check(request)
            work = partial(self._translator.tokens, request)
            return await self._tokenizing.run(turn_of(context), work)
        except Exception as error:
            await abort(context, _failure(error))

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.Text:
        """Returns the text that Generate would write for token ids."""
        try:
            self._translator.check(request)
            # Not in the threads that tokenize: it takes milliseconds.
            return await asyncio.to_thread(self._translator.text, request)
        except Exception as error:
            await abort(context, _failure(error))

    async def GetMetrics(
        self, request: pb.GetMetricsRequest, context: grpc.aio.ServicerContext
    ) -> pb.Metrics:
        """Returns the metrics of this process, in a thread: labels may be many."""
        try:
            return pb.Metrics(text=await asyncio.to_thread(self._calls.metrics_text))
        except Exception as error:
            await abort(context, _failure(error))

    async def Drain(
        self, request: pb.DrainRequest, context: grpc.aio.ServicerContext
    ) -> pb.DrainReply:
        """Refuses later requests, and asks the process to end once the running ones have ended."""
        try:
            running = await self._worker.begin_drain()
        except Exception as error:
            await abort(context, _failure(error))
        self.was_told_to_end.set()
        return pb.DrainReply(running=running)

    async def _read(
        self, message: pb.GenerateRequest, seconds: float | None
    ) -> tuple[Request, AnswerForm | None]:
        """Returns the engine's request for a message, and the form of its answer."""
        deadline = None if seconds is None else time.monotonic() + seconds
        self._translator.check(message)
        adapter = self._models.adapter_of(message.model)
        if not await self._worker.admits(message.n or 1, message.caller):
            # Asked before the prompt is rendered, which under overload would be in vain.
            raise Overloaded("too many requests are waiting already; try again shortly")
        if self._translator.is_quick(message):
            request = self._translator.request(message, deadline)
        else:  # in a thread: a long prompt takes milliseconds, and other streams go on
            read = partial(self._translator.request, message, deadline)
            request = await self._tokenizing.run(message.caller, read)
        request = replace(request, adapter=adapter) if adapter else request
        if not self._translator.needs_form(message):
            return request, None
        # In threads of its own, so that prompts do not wait for grammars.
        compiled = partial(self._translator.form, message)
        form = await self._compiling.run(message.caller, compiled)
        return (request, None) if form is None else (replace(request, form=form.form), form)

    async def _generate(
        self,
        message: pb.GenerateRequest,
        seconds: float | None,
        call: Call,
        begin: Callable[[AnswerForm | None], Awaitable[None]] | None = None,
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        """Yields the answer's chunks; `begin` is called with its form before the first one."""
        request, form = await self._read(message, seconds)
        answer = AnswerText(
            request,
            self._tokenizer,
            Stops.of(message, self._tokenizer),
            continues=continues(message),
            form=form,
            pace=self._pace,
        )
        call.submitted(request)
        if request.num_scored and self._prepare_scores is not None:
            await asyncio.wrap_future(self._prepare_scores())
        is_computed = request.max_tokens > 0 or request.num_scored > 0
        submission: Submission | Uncomputed
        if is_computed:
            submission = self._worker.submit(request)
        else:
            submission = Uncomputed(request, self.max_context)
        async with aclosing(submission) as events:
            await events.accepted()
            if begin is not None:
                await begin(form)
            yield answer.opening(
                has_pieces=message.return_prompt_pieces, has_ids=message.return_prompt_ids
            )
            try:
                async for event in events:
                    if answer.reason(event.choice) is not None:
                        continue  # by a stop text, which reaches the engine a little later
                    if event.drawn is None and event.finish_reason is None:
                        for scores in answer.scores(event):
                            yield scores
                        if (progress := answer.progress(event)) is not None:
                            yield progress
                        continue
                    call.note(event, events.came)
                    answer.push(event, events.came)
                    if (reason := answer.reason(event.choice)) is not None:
                        call.ended(event.choice, reason)
                    for chunk in answer.chunks(events.next_came):
                        if chunk.finish_reason and answer.needs_check:
                            chunk.violation = await self._violation(answer, request, chunk.choice)
                            if chunk.violation:
                                call.violated()
                        yield chunk
                    if answer.has_ended:
                        return  # which cancels what the engine still does
                    if reason is not None and event.finish_reason is None:
                        self._worker.end(request.id, event.choice)
            except ServingError:
                for chunk in answer.rest():
                    yield chunk
                raise

    async def _violation(self, answer: AnswerText, request: Request, index: int) -> str:
        """Returns how a choice misses a part of its form that is not enforced; "" if it does not.

        In a thread: the schema is the caller's, and so is the time that a check of it takes.
        """
        work = partial(answer.violation, index)
        try:
            return await self._compiling.run(request.caller, work) or ""
        except Exception as error:
            _log.error("an answer could not be checked", exc_info=error)
            return "the answer could not be checked against its schema"


async def _begin(context: grpc.aio.ServicerContext, form: AnswerForm | None) -> None:
    """Tells what of an answer's form is not enforced, before the first chunk is sent.

    So a gateway that has read that chunk can still say it in a header.
    """
    if form is not None and form.weakened:
        await context.send_initial_metadata(((WEAKENED_METADATA, header(form.weakened)),))


def _failure(error: Exception) -> ServingError:
    """Returns the error for a caller; of an exception that is a fault of ours, the log's number."""
    if isinstance(error, ServingError):
        return error
    number = secrets.token_hex(4)
    _log.error("call failed: %s", number, exc_info=error)
    return EngineFailure(f"the call failed; the server's log has the reason under {number}")


async def create_server(
    address: str,
    service: InferenceService,
    access: Access,
    tls: ServerTls | RenewedServerTls | None = None,
    admission: Admission | None = None,
    fields: CallerFields | None = None,
    max_calls: int = 256,
    *,
    shares_port: bool = False,
    own_address: str | None = None,
) -> tuple[grpc.aio.Server, int, Any]:
    """A started server on `address` (port 0 chooses one): (server, port, health), SERVING.

    With `shares_port` other processes that do so may listen there too, and the system gives each
    connection to one of them; it listens on `own_address` as well, if there is one.

    Calls of others than the gateway are admitted and charged by `admission`, by default without
    limits, and marked by `fields`. `max_calls` is the number of requests that the engine can hold:
    a caller may have 100 calls more, which are refused by name. Raises OSError if the address is
    taken.
    """
    direct_calls = DirectCalls(
        admission or Admission(Accounts()), fields or CallerFields(None), service.max_context
    )
    doorkeeper = AccessInterceptor(access, OPERATORS_ONLY, direct_calls=direct_calls)
    calls_of_caller = max_calls + _SPARE_CALLS
    rpcs = calls_of_caller * _FULL_CALLERS + MAX_HEALTH_CALLS
    server = grpc.aio.server(
        interceptors=[CallLog(doorkeeper, OpenCalls(calls_of_caller), HealthCalls())],
        # A stream beyond these is reset, which tells its caller nothing: calls end before that.
        options=[
            *_OPTIONS,
            ("grpc.max_concurrent_streams", 2 * rpcs),
            # Otherwise two services could share a port, and each would get half of the requests.
            ("grpc.so_reuseport", int(shares_port)),
        ],
        maximum_concurrent_rpcs=rpcs,
    )
    rpc.add_InferenceServicer_to_server(service, server)
    checks = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    add_reflection((SERVICE_NAME, health.SERVICE_NAME), server)
    port = _listen(server, address, tls)
    if own_address is not None:
        _listen(server, own_address, tls)
    await server.start()
    await set_serving(checks, True)
    return server, port, checks


def _listen(server: grpc.aio.Server, address: str, tls: ServerTls | RenewedServerTls | None) -> int:
    """Has a server listen on an address; returns the port. Raises OSError."""
    try:
        if tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, tls.credentials())
    except RuntimeError:
        raise OSError(f"cannot listen on {address}; is another server running there?") from None


async def set_serving(checks: Any, serving: bool) -> None:
    """Sets the answer of grpc.health.v1 for the server as a whole and for Inference."""
    status = (
        health_pb2.HealthCheckResponse.SERVING
        if serving
        else health_pb2.HealthCheckResponse.NOT_SERVING
    )
    for name in ("", SERVICE_NAME):
        await checks.set(name, status)
