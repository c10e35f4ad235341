"""The Python client of `mixtral.v1`: answers as they come, or whole, with or without asyncio.

    with Client("127.0.0.1:50051", key="...") as client:
        for delta in client.chat([{"role": "user", "content": "Hello!"}], max_tokens=40):
            print(delta.text, end="")

Leaving an iterator, by `break` or by an exception, cancels its call, and the server stops computing
it. (An iterator that another variable still holds must be closed by `close`.) A failed call raises
an error of serving/errors.py; wrong arguments raise TypeError or ValueError before anything is
sent.

This module needs grpcio and protobuf alone, never jax.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Unpack

import grpc

from serving.channel import options_for, target_of
from serving.client.functions import result_text, tools_of
from serving.client.rounds import Rounds, Run, explain
from serving.client.translation import (
    check_answers,
    delta_of,
    info_of,
    tokenize_request_of,
    tokens_of,
)
from serving.client.types import (
    Completion,
    Delta,
    Message,
    ModelInfo,
    Options,
    Prompt,
    Tokens,
    Tool,
    completion_of,
)
from serving.errors import (
    ERROR_METADATA,
    WEAKENED_METADATA,
    RequestTooLarge,
    ServingError,
    Unavailable,
    from_grpc,
)
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc as rpc

__all__ = ["AsyncClient", "Client"]

SHORT_CALL_SECONDS = 30.0  # the deadline of calls for which the model computes nothing


class _Connection:
    """The target, key and certificates that both clients make their channel of."""

    def __init__(
        self,
        targets: Sequence[str],
        key: str | None,
        tls: bool,
        root_certificates: bytes | None,
        certificate: tuple[bytes, bytes] | None,
        server_name: str | None,
    ) -> None:
        self.target = target_of(targets or ["127.0.0.1:50051"])
        self.metadata = (("authorization", f"Bearer {key}"),) if key is not None else ()
        self.options = options_for(self.target)
        self.credentials: grpc.ChannelCredentials | None = None
        if tls or root_certificates or certificate:
            private_key, chain = certificate or (None, None)
            self.credentials = grpc.ssl_channel_credentials(root_certificates, private_key, chain)
            if server_name is not None:
                self.options.append(("grpc.ssl_target_name_override", server_name))

    def open(self, module: Any) -> Any:
        """Returns an open channel of `module`, which is `grpc` or `grpc.aio`."""
        if self.credentials is None:
            return module.insecure_channel(self.target, options=self.options)
        return module.secure_channel(self.target, self.credentials, options=self.options)


class Client:
    """Calls a model service, or several replicas of it in turn.

    All methods raise an error of serving/errors.py if the call fails. `options` are those of
    `serving.client.types.Options`.

    Args:
        targets: HOST:PORT, 127.0.0.1:50051 by default; `serving.channel.target_of` has more forms.
        key: An API key of the server, or a token that it accepts.
        tls: Whether the connection is encrypted. Without `root_certificates` the server's
            certificate must be signed by an authority that gRPC knows.
        root_certificates: PEM of the authorities that sign the server's certificate; implies `tls`.
        certificate: Private key and certificate chain in PEM, for a server that asks for them.
        server_name: The name in the server's certificate, if that is not its address.
    """

    def __init__(
        self,
        *targets: str,
        key: str | None = None,
        tls: bool = False,
        root_certificates: bytes | None = None,
        certificate: tuple[bytes, bytes] | None = None,
        server_name: str | None = None,
    ) -> None:
        connection = _Connection(targets, key, tls, root_certificates, certificate, server_name)
        self._metadata = connection.metadata
        self._channel: grpc.Channel = connection.open(grpc)
        self._stub: Any = rpc.InferenceStub(self._channel)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        continue_last: bool = False,
        **options: Unpack[Options],
    ) -> Iterator[Delta]:
        """Yields the answer to a chat as it comes.

        Args:
            messages: The chat.
            continue_last: Whether the last message, an assistant's, is the beginning of the answer.
            options: How to answer. Of `tools`, functions are run and the model answers again, until
                it calls none, or calls a tool that is no function.
        """
        return self._answers(_rounds(messages, continue_last, options), options)

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[Delta]:
        """Yields what continues a text or token ids, or the answer to a chat, as it comes."""
        return self._answers(_rounds(prompt, False, options), options)

    def complete(
        self, prompt: Prompt, *, continue_last: bool = False, **options: Unpack[Options]
    ) -> Completion:
        """Returns the whole answer to a chat, or what continues a text or token ids."""
        return completion_of(self._answers(_rounds(prompt, continue_last, options), options))

    def tokenize(
        self,
        prompt: Sequence[Message] | str,
        *,
        continue_last: bool = False,
        tools: Sequence[Tool | Callable[..., Any]] = (),
    ) -> Tokens:
        """Returns the ids that the model would read."""
        request = tokenize_request_of(prompt, continue_last, tools_of(tools))
        return tokens_of(self._ask("Tokenize", request))

    def detokenize(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        return str(self._ask("Detokenize", pb.DetokenizeRequest(ids=ids)).text)

    def info(self) -> ModelInfo:
        """Returns the served model's name and sizes."""
        return info_of(self._ask("GetModelInfo", pb.GetModelInfoRequest()))

    def drain(self) -> int:
        """Ends a server when the answers under way have ended; returns their number.

        It needs an operator's key. Of several targets it ends the next in turn.
        """
        return int(self._ask("Drain", pb.DrainRequest()).running)

    def close(self) -> None:
        """Cancels the calls under way and closes the connection."""
        self._channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _answers(self, rounds: Rounds, options: Options) -> Iterator[Delta]:
        """Yields the answers of all rounds; between them it runs what they call."""
        while True:
            for delta in self._stream(rounds.request, options):
                rounds.note(delta)
                yield delta
            runs = rounds.runs()
            if not runs:
                return
            yield rounds.add([_result(run) for run in runs])

    def _stream(self, request: pb.GenerateRequest, options: Options) -> Iterator[Delta]:
        timeout = options.get("timeout")
        call = self._stub.Generate(request, metadata=self._metadata, timeout=timeout)
        weakened = None
        try:
            for chunk in call:
                if weakened is None:
                    check_answers(chunk, request.model)
                    weakened = _weakened(call.initial_metadata())
                    yield delta_of(chunk, weakened)
                else:
                    yield delta_of(chunk)
        except grpc.RpcError as failure:
            raise _error_of(failure) from failure
        finally:
            call.cancel()

    def _ask(self, method: str, request: Any) -> Any:
        try:
            return getattr(self._stub, method)(
                request, metadata=self._metadata, timeout=SHORT_CALL_SECONDS
            )
        except grpc.RpcError as failure:
            raise _error_of(failure) from failure


class AsyncClient:
    """Does for asyncio what `Client` does, with the same arguments.

    It must be made, used and closed in the same event loop.
    """

    def __init__(
        self,
        *targets: str,
        key: str | None = None,
        tls: bool = False,
        root_certificates: bytes | None = None,
        certificate: tuple[bytes, bytes] | None = None,
        server_name: str | None = None,
    ) -> None:
        connection = _Connection(targets, key, tls, root_certificates, certificate, server_name)
        self._metadata = connection.metadata
        self._channel: grpc.aio.Channel = connection.open(grpc.aio)
        self._stub: Any = rpc.InferenceStub(self._channel)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        continue_last: bool = False,
        **options: Unpack[Options],
    ) -> AsyncIterator[Delta]:
        """Yields the answer to a chat as it comes, like `Client.chat`."""
        return self._answers(Rounds(messages, continue_last, options), options)

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncIterator[Delta]:
        """Yields what continues a prompt as it comes, like `Client.generate`."""
        return self._answers(Rounds(prompt, False, options), options)

    async def complete(
        self, prompt: Prompt, *, continue_last: bool = False, **options: Unpack[Options]
    ) -> Completion:
        """Returns the whole answer, like `Client.complete`."""
        deltas = self._answers(Rounds(prompt, continue_last, options), options)
        return completion_of([delta async for delta in deltas])

    async def tokenize(
        self,
        prompt: Sequence[Message] | str,
        *,
        continue_last: bool = False,
        tools: Sequence[Tool | Callable[..., Any]] = (),
    ) -> Tokens:
        """Returns the ids that the model would read, like `Client.tokenize`."""
        request = tokenize_request_of(prompt, continue_last, tools_of(tools))
        return tokens_of(await self._ask("Tokenize", request))

    async def detokenize(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, like `Client.detokenize`."""
        return str((await self._ask("Detokenize", pb.DetokenizeRequest(ids=ids))).text)

    async def info(self) -> ModelInfo:
        """Returns the served model's name and sizes, like `Client.info`."""
        return info_of(await self._ask("GetModelInfo", pb.GetModelInfoRequest()))

    async def drain(self) -> int:
        """Ends a server when the answers under way have ended, like `Client.drain`."""
        return int((await self._ask("Drain", pb.DrainRequest())).running)

    async def close(self) -> None:
        """Cancels the calls under way and closes the connection."""
        await self._channel.close(None)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self.close()

    async def _answers(self, rounds: Rounds, options: Options) -> AsyncIterator[Delta]:
        """Yields the answers of all rounds; between them it runs what they call, one by one.

        Functions that are not to be awaited run in a thread.
        """
        while True:
            async for delta in self._stream(rounds.request, options):
                rounds.note(delta)
                yield delta
            runs = rounds.runs()
            if not runs:
                return
            yield rounds.add([await _awaited_result(run) for run in runs])

    async def _stream(self, request: pb.GenerateRequest, options: Options) -> AsyncIterator[Delta]:
        timeout = options.get("timeout")
        call = self._stub.Generate(request, metadata=self._metadata, timeout=timeout)
        weakened = None
        try:
            async for chunk in call:
                if weakened is None:
                    check_answers(chunk, request.model)
                    weakened = _weakened(await call.initial_metadata())
                    yield delta_of(chunk, weakened)
                else:
                    yield delta_of(chunk)
        except grpc.RpcError as failure:
            raise _error_of(failure) from failure
        finally:
            call.cancel()

    async def _ask(self, method: str, request: Any) -> Any:
        try:
            return await getattr(self._stub, method)(
                request, metadata=self._metadata, timeout=SHORT_CALL_SECONDS
            )
        except grpc.RpcError as failure:
            raise _error_of(failure) from failure


def _rounds(prompt: Prompt, continue_last: bool, options: Options) -> Rounds:
    """Returns the rounds of a client that awaits nothing."""
    rounds = Rounds(prompt, continue_last, options)
    if rounds.has_coroutines:
        raise TypeError("a function of tools is to be awaited; use AsyncClient")
    return rounds


def _result(run: Run) -> str:
    """Returns what a function returns, as text for the model."""
    if run.arguments is None:
        return run.mistake
    try:
        return result_text(run.function.run(run.arguments))
    except Exception as error:
        explain(error, run)
        raise


async def _awaited_result(run: Run) -> str:
    if not run.function.is_async or run.arguments is None:
        return await asyncio.to_thread(_result, run)
    try:
        return result_text(await run.function.run(run.arguments))
    except Exception as error:
        explain(error, run)
        raise


def _weakened(metadata: Any) -> str:
    return next((str(value) for key, value in metadata or () if key == WEAKENED_METADATA), "")


def _error_of(failure: grpc.RpcError) -> ServingError:
    trailing: Any = failure.trailing_metadata() or ()
    name = next((str(value) for key, value in trailing if key == ERROR_METADATA), None)
    status, details = failure.code(), failure.details() or ""
    if name is None and status is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return RequestTooLarge(details)  # gRPC's own refusal of a message
    if name is None and status is grpc.StatusCode.CANCELLED:
        return Unavailable("the connection was closed before the answer was complete")
    return from_grpc(status.name, details, trailing)
