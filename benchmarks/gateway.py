"""The number of streamed tokens a second that a core of the gateway passes on.

    python -m benchmarks.gateway [--clients 64] [--tokens 200] [--json FILE]

A stand-in for the model service sends a word a chunk without waiting. It, the gateway and the
clients are three processes. The figure is of the gateway's own processor time, and so does not
depend on the load of the other two. Each figure is the median of --repeats.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
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
    """A stand-in for a model that sends max_tokens words, a chunk each, without waiting."""

    async def GetModelInfo(self, request: Any, context: Any) -> inference_pb2.ModelInfo:
        """Returns facts of no model."""
        return inference_pb2.ModelInfo(
            name="parrot", type="chat-completions", provider="Nobody", max_context=1 << 20
        )

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        """Yields the words of an answer."""
        for place in range(request.max_tokens):
            yield inference_pb2.GenerateChunk(text=_WORD, token_ids=[place])
            await asyncio.sleep(0)  # so that streams take turns, as an engine's do
        yield inference_pb2.GenerateChunk(
            finish_reason=inference_pb2.FINISH_REASON_STOP,
            usage=inference_pb2.Usage(prompt_tokens=1, completion_tokens=request.max_tokens),
        )


async def serve_words() -> None:
    """Prints a free port and serves the stand-in for a model on it until a signal ends it."""
    end_with_parent()
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(Parrot(), server)
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


def measure(clients: int, tokens: int, repeats: int) -> dict[str, float]:
    """Medians: tokens for each second of the gateway's processor time, and of the clock."""
    with ExitStack() as stack:
        _, line = _started(stack, ["-m", "benchmarks.gateway", "--speak"], "")
        target = f"127.0.0.1:{int(line)}"
        pid, line = _started(
            stack, ["-m", "serving.gateway", "--target", target, "--port", "0"], "listening on"
        )
        port = int(line.split("http://127.0.0.1:")[1].split()[0])
        gateway = psutil.Process(pid)
        asyncio.run(_load(port, clients, 10))
        by_core, by_clock = [], []
        for _ in range(repeats):
            before, began = gateway.cpu_times(), time.perf_counter()
            num_tokens = asyncio.run(_load(port, clients, tokens))
            seconds, after = time.perf_counter() - began, gateway.cpu_times()
            busy = after.user + after.system - before.user - before.system
            by_core.append(num_tokens / busy)
            by_clock.append(num_tokens / seconds)
    return {
        "clients": clients,
        "tokens_per_core_second": statistics.median(by_core),
        "tokens_per_second": statistics.median(by_clock),
    }


def main(
    clients: Annotated[int, typer.Option(min=1, help="Clients that stream at once.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 200,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
    speak: Annotated[bool, typer.Option("--speak", hidden=True)] = False,
) -> None:
    """Measure how many streamed tokens a second one core of the gateway passes on."""
    if speak:
        asyncio.run(serve_words())
        return
    result = measure(clients, tokens, repeats)
    print(
        f"{clients} clients: {result['tokens_per_core_second']:,.0f} streamed tokens a "
        f"second of the gateway's processor time, {result['tokens_per_second']:,.0f} a second"
    )
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run(main, "benchmarks.gateway")
