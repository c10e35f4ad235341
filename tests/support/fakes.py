"""Stand-ins whose answers can be worked out by hand, and a way to run the gateway before them."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from serving import errors, flags
from serving.access.credentials import Access
from serving.access.keyring import Keyring
from serving.channel import INFERENCE
from serving.gateway.answering import Limits
from serving.gateway.app import create_app
from serving.gateway.config import GatewayConfig
from serving.gateway.http.connections import Connections
from serving.gateway.http.drain import Drain
from serving.gateway.http.failures import refuse_while_draining
from serving.gateway.http.limits import HttpLimits
from serving.gateway.http.metrics import GatewayMetrics
from serving.gateway.http.server import HttpServer
from serving.proto import inference_pb2, inference_pb2_grpc
from serving.service.models.served_models import ServedModels

KEY = "this-key-is-not-a-secret"
# No wait of a test is longer, and only a failing test waits so long.
PATIENCE = 10.0
# Like the real service, a stand-in takes the pings of idle gateways for no abuse.
SERVER_OPTIONS = (("grpc.http2.max_ping_strikes", 0),)


class ScriptedInference(inference_pb2_grpc.InferenceServicer):
    """Says the words of the last message or of the prompt, a chunk each, and counts them.

    "one two" is answered with "one", " two" and a chunk that ends it: 2 tokens, and as many prompt
    tokens as there are messages; a text or ids count as one message, and ids are said as numbers.
    Several choices say the same in turn. The token at place i has the logprob -i. Words that begin
    with "!" are not said but done:

        !open          sends the chunk that says that the prompt has been queued
        !compute       sends a chunk that says how much of the prompt has been computed
        !call:F:ARGS   calls the tool F, a token, with these arguments, without spaces
        !miss:TEXT     says at the end that the answer misses a part of its schema
        !weak:TEXT     says in the metadata that these parts of schemas were weakened
        !wait          waits until `release` is called
        !long          fails as a prompt does that no context holds
        !fail:LEAF     fails with that error of serving/errors.py
        !status:CODE   fails with that status and no name, as gRPC itself does
        !vanish        ends the stream without a reason to finish

    Its names are "scripted-7B" and those of `aliases`, and it has the adapters of `adapters`.
    """

    def __init__(self) -> None:
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.metadata: list[dict[str, str]] = []  # of the same calls
        self.aliases = {"azureai"}
        self.reads_names = True  # False: like a service that is older than adapters
        self.adapters: dict[str, str] = {}  # their digests by their names
        # Calls of Tokenize, with their metadata.
        self.tokenized: list[tuple[inference_pb2.TokenizeRequest, dict[str, Any]]] = []
        self.cached_tokens = 0  # of each prompt, as its usage says
        self.guesses = (0, 0)  # of each answer, accepted and rejected, as its usage says
        self.sampling_defaults = inference_pb2.SamplingParams()  # of the model
        self.begun = threading.Event()
        self.cancelled = threading.Event()
        self._released = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def release(self) -> None:
        """Ends the waits; may be called from any thread."""
        self._loop.call_soon_threadsafe(self._released.set)

    def reset(self) -> None:
        """Forgets what was asked and released so far."""
        self.requests.clear()
        self.tokenized.clear()
        self.metadata.clear()
        self.begun.clear()
        self.cancelled.clear()
        self._loop.call_soon_threadsafe(self._released.clear)

    def _models(self) -> ServedModels:
        return ServedModels("scripted-7B", self.aliases, lambda: self.adapters)

    async def GetModelInfo(
        self, request: inference_pb2.GetModelInfoRequest, context: Any
    ) -> inference_pb2.ModelInfo:
        await _check_key(context)
        return inference_pb2.ModelInfo(
            name="scripted-7B",
            type="chat-completions",
            provider="Nobody",
            max_context=64,
            adapters=self._models().listed(),
            sampling_defaults=self.sampling_defaults,
        )

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Any
    ) -> inference_pb2.Tokens:
        """A token for each byte of the text or of the last message, between 256 and 257.

        256 opens what has special tokens, and 257 the answer to a chat. "!long" is too long.
        """
        await _check_key(context)
        self.tokenized.append((request, dict(context.invocation_metadata() or ())))
        is_chat = request.WhichOneof("input") == "chat"
        text = request.chat.messages[-1].content if is_chat else request.text
        if text.startswith("!"):
            await self._do(text, context)
        ids = list(text.encode())
        if is_chat or request.add_special_tokens:
            ids.insert(0, 256)
        opens = not request.chat.HasField("add_generation_prompt") or (
            request.chat.add_generation_prompt
        )
        if is_chat and opens and not request.chat.continue_last:
            ids.append(257)
        pieces = [bytes([i]) if i < 256 else b"" for i in ids]
        return inference_pb2.Tokens(ids=ids, pieces=pieces)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Any
    ) -> inference_pb2.Text:
        """The inverse."""
        await _check_key(context)
        pieces = bytes(i for i in request.ids if i < 256)
        return inference_pb2.Text(text=pieces.decode("utf-8", "replace"))

    async def GetMetrics(
        self, request: inference_pb2.GetMetricsRequest, context: Any
    ) -> inference_pb2.Metrics:
        """Two families, of which the gateway has one itself."""
        await _check_key(context)
        return inference_pb2.Metrics(
            text=b"# HELP vllm:prompt_tokens_total Tokens of prompts.\n"
            b"# TYPE vllm:prompt_tokens_total counter\n"
            b'vllm:prompt_tokens_total{model_name="scripted-7B"} 7.0\n'
            b"# HELP mixtral_gateway_open_requests Requests under way.\n"
            b"# TYPE mixtral_gateway_open_requests gauge\n"
            b"mixtral_gateway_open_requests 99.0\n"
        )

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        await _check_key(context)
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        self.begun.set()
        adapter = None
        try:
            if self.reads_names:
                adapter = self._models().adapter_of(request.model)
        except errors.ModelNotFound as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error), errors.to_grpc(error))
        said = 0
        choices = range(request.n if request.HasField("n") else 1)
        reason = inference_pb2.FINISH_REASON_STOP
        missed = ""
        try:
            for word in _prompt(request).split():
                if word == "!vanish":
                    return
                if word in ("!open", "!compute"):
                    tokens = len(request.chat.messages) or 1
                    name = "prompt_tokens" if word == "!open" else "computed_tokens"
                    yield inference_pb2.GenerateChunk(**{name: tokens}, adapter=adapter)
                    continue
                if word.startswith("!call:"):
                    name, _, arguments = word.removeprefix("!call:").partition(":")
                    for choice in choices:
                        call = inference_pb2.ToolCall(
                            id=f"call{said:05}", name=name, arguments=arguments
                        )
                        chunk = inference_pb2.GenerateChunk(
                            tool_calls=[call], token_ids=[said], choice=choice
                        )
                        if said == choice == 0:
                            chunk.MergeFrom(_opening(request, adapter))
                        yield chunk
                    said += 1
                    reason = inference_pb2.FINISH_REASON_TOOL_CALLS
                    continue
                if word.startswith("!miss:"):
                    missed = word.removeprefix("!miss:")
                    continue
                if word.startswith("!"):
                    await self._do(word, context)
                    continue
                if request.HasField("max_tokens") and said == request.max_tokens:
                    reason = inference_pb2.FINISH_REASON_LENGTH
                    break
                for choice in choices:
                    text = " " * (said > 0) + word
                    chunk = inference_pb2.GenerateChunk(text=text, token_ids=[said], choice=choice)
                    if said == choice == 0:
                        chunk.MergeFrom(_opening(request, adapter))
                    if request.HasField("top_logprobs"):
                        chunk.logprobs.append(_logprobs(text, said, request.top_logprobs))
                    yield chunk
                said += 1
            for choice in choices:
                last = inference_pb2.GenerateChunk(
                    finish_reason=reason, choice=choice, violation=missed
                )
                if choice == choices[-1]:
                    last.usage.prompt_tokens = len(request.chat.messages) or 1
                    last.usage.completion_tokens = said * len(choices)
                    last.usage.cached_tokens = self.cached_tokens
                    last.usage.accepted_guesses, last.usage.rejected_guesses = self.guesses
                yield last
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _do(self, word: str, context: Any) -> None:
        order, _, argument = word[1:].partition(":")
        match order:
            case "wait":
                await self._released.wait()
            case "weak":
                await context.send_initial_metadata((("mixtral-weakened", argument),))
            case "long":
                too_long = errors.ContextTooLong.of(64, "the prompt has 99 tokens")
                await context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT, str(too_long), errors.to_grpc(too_long)
                )
            case "fail":
                leaf = errors.LEAVES[argument]
                await context.abort(
                    grpc.StatusCode[leaf.grpc_status],
                    f"{argument} was asked for",
                    ((errors.ERROR_METADATA, argument),),
                )
            case "status":
                await context.abort(grpc.StatusCode[argument], "at ipv4:10.0.0.1:50051")
            case _:
                raise ValueError(word)


def _opening(
    request: inference_pb2.GenerateRequest, adapter: str | None
) -> inference_pb2.GenerateChunk:
    """What is in the first chunk alone."""
    tokens = len(request.chat.messages) or 1
    ids = request.token_ids.ids or range(100, 100 + tokens)
    return inference_pb2.GenerateChunk(
        prompt_tokens=tokens,
        adapter=adapter,
        prompt_ids=ids if request.return_prompt_ids else (),
    )


def _prompt(request: inference_pb2.GenerateRequest) -> str:
    match request.WhichOneof("prompt"):
        case "chat":
            return request.chat.messages[-1].content
        case "text":
            return request.text
        case _:
            return " ".join(map(str, request.token_ids.ids))


def _logprobs(text: str, place: int, count: int) -> inference_pb2.TokenLogprob:
    def of(top: list[inference_pb2.TokenLogprob]) -> inference_pb2.TokenLogprob:
        return inference_pb2.TokenLogprob(
            token_id=place, token=text.encode(), logprob=-place, top=top
        )

    return of([of([])] * count)


async def _check_key(context: Any) -> None:
    if ("authorization", f"Bearer {KEY}") not in list(context.invocation_metadata() or ()):
        await context.abort(
            grpc.StatusCode.UNAUTHENTICATED,
            "wrong key",
            ((errors.ERROR_METADATA, "Unauthenticated"),),
        )


@dataclass(frozen=True)
class Stack:
    """A gateway and the scripted service behind it, both at ports of 127.0.0.1."""

    url: str
    target: str
    service: ScriptedInference
    health: Any
    loop: asyncio.AbstractEventLoop

    def set_serving(self, is_serving: bool) -> None:
        """What the service says of its health."""
        states = health_pb2.HealthCheckResponse
        state = states.SERVING if is_serving else states.NOT_SERVING
        for name in ("", INFERENCE):
            change = self.health.set(name, state)
            asyncio.run_coroutine_threadsafe(change, self.loop).result(PATIENCE)


def gateway_config(**changes: Any) -> GatewayConfig:
    """The settings of a gateway without flags, but for `changes`."""
    given = flags.defaults(flags.GATEWAY, gateway_key=KEY)
    return flags.record(GatewayConfig, given | changes)


@contextlib.contextmanager
def running_stack(
    key: str = KEY,
    target: str | None = None,
    inference: Callable[[], contextlib.AbstractAsyncContextManager[str]] | None = None,
    heartbeat_seconds: float = 60.0,
    access: Access | None = None,
    limits: Limits | None = None,
    http: HttpLimits | None = None,
    parts: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Iterator[Stack]:
    """Runs a gateway before the scripted service, or before `target`, in a thread of its own.

    `inference` runs another service in the gateway's event loop and gives its target. `parts` are
    keywords of `create_app`, and `settings` fields of GatewayConfig.

    Both live in one event loop: gRPC's poller serves several loops of one process badly.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    started: list[Stack] = []
    is_up = threading.Event()
    stop = asyncio.Event()

    async def run() -> None:
        service = ScriptedInference()
        health_servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
        server = grpc.aio.server(options=SERVER_OPTIONS)
        inference_pb2_grpc.add_InferenceServicer_to_server(service, server)
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        await health_servicer.set(INFERENCE, health_pb2.HealthCheckResponse.SERVING)
        own = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        others = contextlib.AsyncExitStack()
        other = await others.enter_async_context(inference()) if inference else None
        metrics = (parts or {}).get("metrics") or GatewayMetrics()
        drain = Drain(refuse_while_draining, refuse_while_draining, 0.0)
        app = create_app(
            gateway_config(
                target=(target or other or own,),
                gateway_key=key,
                heartbeat_seconds=heartbeat_seconds,
                **settings,
            ),
            access or Access(Keyring({"default": key})),
            limits=limits,
            **({"metrics": metrics, "drain": drain} | dict(parts or {})),
        )
        connections = Connections(http or HttpLimits(), metrics)
        config = uvicorn.Config(app, log_config=None, log_level="warning", ws="none")
        web = HttpServer(config, drain, listener, connections)
        serving = asyncio.create_task(web.serve())
        while not web.started:
            await asyncio.sleep(0.01)
        loop = asyncio.get_running_loop()
        started.append(Stack(url, own, service, health_servicer, loop))
        is_up.set()
        await stop.wait()
        web.should_exit = True
        await serving
        await others.aclose()
        await server.stop(0)

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    assert is_up.wait(PATIENCE)
    try:
        yield started[0]
    finally:
        started[0].loop.call_soon_threadsafe(stop.set)
        thread.join(PATIENCE)
        assert not thread.is_alive()
