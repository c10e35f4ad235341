"""The processor time that the gateway takes for a streamed token.

    python -m benchmarks.gateway [--clients N ...] [--tokens 200] [--chunk-tokens 1]
        [--processes 1] [--json FILE]

A stand-in for the model service sends --chunk-tokens words a chunk without waiting. It, the gateway
and the clients are processes of their own. The figure is of the gateway's processor time, summed
over its processes, and so does not depend on the load of the others. Each figure is the median of
--repeats.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import grpc
import psutil
import typer
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from benchmarks.command import run
from serving.channel import INFERENCE
from serving.parent import PARENT_VARIABLE, end_with_parent
from serving.proto import inference_pb2, inference_pb2_grpc

_KEY = "this-key-is-not-a-secret"
_WORD = " word"


class Parrot(inference_pb2_grpc.InferenceServicer):
    """A stand-in for a model that sends max_tokens words without waiting.

    Args:
        chunk_tokens: Words of a chunk.
    """

    def __init__(self, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens

    async def GetModelInfo(self, request: Any, context: Any) -> inference_pb2.ModelInfo:
        """Returns facts of no model."""
        return inference_pb2.ModelInfo(
            name="parrot", type="chat-completions", provider="Nobody", max_context=1 << 20
        )

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        """Yields the words of an answer."""
        for place in range(0, request.max_tokens, self._chunk_tokens):
            ids = range(place, min(place + self._chunk_tokens, request.max_tokens))
            yield inference_pb2.GenerateChunk(text=_WORD * len(ids), token_ids=ids)
            await asyncio.sleep(0)  # so that streams take turns, as an engine's do
        yield inference_pb2.GenerateChunk(
            finish_reason=inference_pb2.FINISH_REASON_STOP,
            usage=inference_pb2.Usage(prompt_tokens=1, completion_tokens=request.max_tokens),
        )


async def serve_words(chunk_tokens: int) -> None:
    """Prints a free port and serves the stand-in for a model on it until a signal ends it."""
    end_with_parent()
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(Parrot(chunk_tokens), server)
    checks = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    await checks.set(INFERENCE, health_pb2.HealthCheckResponse.SERVING)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


async def _client(port: int, tokens: int) -> int:
    """Reads a streamed answer from a bare socket, which costs less than an HTTP client."""
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": tokens,
            "stream": True,
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
        b"content-type: application/json\r\nauthorization: Bearer %s\r\n"
        b"content-length: %d\r\n\r\n%s" % (_KEY.encode(), len(body), body)
    )
    answer = await reader.read(-1)
    writer.close()
    await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in answer, answer[:500]
    words = answer.count(_WORD.encode())
    assert words == tokens, (words, tokens)
    return words


async def _load(port: int, clients: int, tokens: int) -> int:
    return sum(await asyncio.gather(*(_client(port, tokens) for _ in range(clients))))


def _started(stack: ExitStack, command: list[str], needle: str) -> tuple[int, str]:
    """Starts a process that is ended with the stack; (its id, the line that holds `needle`)."""
    process = subprocess.Popen(
        [sys.executable, *command],
        env={
            **os.environ,
            "MIXTRAL_JAX_API_KEY": _KEY,
            "MIXTRAL_JAX_SERVICE_KEY": _KEY,
            # A signal that comes while Popen works leaves no handle by which to end the process.
            PARENT_VARIABLE: str(os.getpid()),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    stack.callback(process.wait, 30)
    stack.callback(process.terminate)
    assert process.stdout is not None
    for line in process.stdout:
        if needle in line:
            # A log that nobody reads would stop its writer.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return process.pid, line
    raise RuntimeError(f"{command} ended early")


def measure(
    clients: Sequence[int], tokens: int, repeats: int, chunk_tokens: int = 1, processes: int = 1
) -> list[dict[str, float]]:
    """Returns medians for each number of clients: microseconds of processor time for a token, and
    tokens for each second of the clock."""
    with ExitStack() as stack:
        speaking = ["-m", "benchmarks.gateway", "--speak", "--chunk-tokens", str(chunk_tokens)]
        _, line = _started(stack, speaking, "")
        command = ["-m", "serving.gateway", "--target", f"127.0.0.1:{int(line)}", "--port", "0"]
        command += ["--gateway-processes", str(processes), "--usage-db", ":memory:"]
        pid, line = _started(stack, command, "listening on")
        port = int(line.split("http://127.0.0.1:")[1].split()[0])
        asyncio.run(_load(port, max(clients), 10))
        parent = psutil.Process(pid)
        gateway = [parent, *parent.children()]
        return [_measured(gateway, port, number, tokens, repeats) for number in clients]


def _measured(
    gateway: Sequence[psutil.Process], port: int, clients: int, tokens: int, repeats: int
) -> dict[str, float]:
    def busy() -> float:
        return sum(
            times.user + times.system for process in gateway for times in (process.cpu_times(),)
        )

    by_token, by_clock = [], []
    for _ in range(repeats):
        before, began = busy(), time.perf_counter()
        num_tokens = asyncio.run(_load(port, clients, tokens))
        by_clock.append(num_tokens / (time.perf_counter() - began))
        by_token.append(1e6 * (busy() - before) / num_tokens)
    return {
        "clients": clients,
        "microseconds_per_token": statistics.median(by_token),
        "tokens_per_second": statistics.median(by_clock),
    }


def main(
    clients: Annotated[
        list[int], typer.Option(min=1, help="Clients that stream at once; may be repeated.")
    ] = [8, 64, 256],  # noqa: B006
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 200,
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a chunk.")] = 1,
    processes: Annotated[int, typer.Option(min=1, help="Processes of the gateway.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
    speak: Annotated[bool, typer.Option("--speak", hidden=True)] = False,
) -> None:
    """Measure the gateway's processor time for a streamed token."""
    if speak:
        asyncio.run(serve_words(chunk_tokens))
        return
    results = measure(clients, tokens, repeats, chunk_tokens, processes)
    for result in results:
        print(
            f"{result['clients']:.0f} clients: {result['microseconds_per_token']:.1f} microseconds "
            f"of the gateway's processor time a token, {result['tokens_per_second']:,.0f} tokens a "
            "second"
        )
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run(main, "benchmarks.gateway")
