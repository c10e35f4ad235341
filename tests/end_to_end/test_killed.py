"""Clients that vanish and processes that die, by real signals, under a real server's load."""

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.servers import Server, free_ports, running, serve_command

pytestmark = pytest.mark.slow
PATIENCE = 60.0
BUSY = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "mixtral_gateway_open_requests",
    "mixtral_gateway_open_streams",
]


@pytest.fixture
def server() -> Iterator[Server]:
    with running(serve_command("tiny-random")) as server:
        yield server


def figures(ports: list[int]) -> dict[str, float]:
    """What service and gateway tell Prometheus, labels left out and added up."""
    figures: dict[str, float] = {}
    for port in ports:
        for line in httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines():
            name, _, value = line.rpartition(" ")
            if name and not line.startswith("#"):
                name = name.partition("{")[0]
                figures[name] = figures.get(name, 0) + float(value)
    return figures


def body(words: str, **parameters: object) -> dict[str, object]:
    message = {"role": "user", "content": words}
    return {"messages": [message], "ignore_eos": True, "stream": True, **parameters}


def service_of(server: Server) -> psutil.Process:
    (service,) = [
        child
        for child in psutil.Process(server.process.pid).children()
        if "serving" in child.cmdline()
    ]
    return service


def test_500_clients_that_vanish_leave_nothing_behind() -> None:
    ports = free_ports(2)
    options = ["--metrics-port", str(ports[0]), "--gateway-metrics-port", str(ports[1])]
    with running(serve_command("tiny-random", *options)) as server:
        _vanish(server, ports)


def _vanish(server: Server, ports: list[int]) -> None:
    dice = random.Random(500)

    async def vanish(port: int) -> None:
        payload = json.dumps(body("hello", max_tokens=200, n=dice.choice([1, 1, 3]))).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
            f"authorization: Bearer {server.key}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(payload)}\r\n\r\n"
        ).encode()
        message = head + payload
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        cut = dice.choice([0, 10, len(head), len(message) - 1, len(message), len(message)])
        writer.write(message[:cut])
        await writer.drain()
        await asyncio.sleep(dice.random() * 0.3)
        if dice.random() < 0.5 and cut == len(message):
            await asyncio.wait_for(reader.read(dice.randrange(1, 3000)), PATIENCE)
        if dice.random() < 0.5:
            writer.transport.abort()  # a reset, where a close would be polite
        else:
            writer.close()

    async def run() -> None:
        port = int(server.url.rpartition(":")[2])
        for _ in range(10):
            await asyncio.gather(*(vanish(port) for _ in range(50)))

    asyncio.run(run())
    deadline = time.monotonic() + PATIENCE
    while True:
        now = figures(ports)
        held = now["mixtral_pages"] - now["mixtral_free_pages"]
        busy = [now[name] for name in BUSY]
        if held == 0 and busy == [0] * len(BUSY):
            break
        assert time.monotonic() < deadline, now
        time.sleep(0.1)
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
        headers={"api-key": server.key},
        timeout=PATIENCE,
    )
    assert answer.status_code == 200


def test_a_killed_service_ends_32_streams_at_once_and_comes_back(server: Server) -> None:
    """Ten times with MIXTRAL_JAX_SOAK=1."""
    headers = {"api-key": server.key}

    async def stream(client: httpx.AsyncClient, running: list[int]) -> float:
        """When the stream broke off; anything but a break is a failure."""
        ended = None
        try:
            async with client.stream("POST", "/v1/chat/completions", json=body("x")) as answer:
                assert answer.status_code == 200, await answer.aread()
                async for line in answer.aiter_lines():
                    if not running[0]:
                        continue
                    running[0] -= line.startswith("data: ") and '"role"' in line
                    assert line != "data: [DONE]"
        except httpx.TransportError:
            ended = time.monotonic()
        assert ended is not None, "the stream ended as if it were whole"
        return ended

    async def kill_once() -> None:
        async with httpx.AsyncClient(
            base_url=server.url, headers=headers, timeout=PATIENCE
        ) as client:
            running = [32]
            streams = [asyncio.create_task(stream(client, running)) for _ in range(32)]
            while running[0] > 0:
                await asyncio.sleep(0.05)
                assert not any(one.done() and one.exception() for one in streams)
            killed = time.monotonic()
            service_of(server).kill()
            ends = await asyncio.gather(*streams)
            assert max(ends) - killed < 2.0
            # Meanwhile it says so, and that a retry helps; then it is there again by itself.
            deadline = time.monotonic() + PATIENCE
            while True:
                answer = await client.post(
                    "/v1/chat/completions", json=body("x", stream=False, max_tokens=2)
                )
                if answer.status_code == 200:
                    break
                assert answer.status_code == 503 and answer.headers["retry-after"]
                assert time.monotonic() < deadline
                await asyncio.sleep(0.2)

    for _ in range(10 if "MIXTRAL_JAX_SOAK" in os.environ else 1):
        asyncio.run(kill_once())


def test_sigterm_lets_streams_finish_and_refuses_new_ones(tmp_path: Path, server: Server) -> None:
    headers = {"api-key": server.key}

    async def run() -> None:
        async with (
            httpx.AsyncClient(base_url=server.url, headers=headers, timeout=PATIENCE) as client,
            client.stream("POST", "/v1/chat/completions", json=body("x", max_tokens=400)) as answer,
        ):
            lines = answer.aiter_lines()
            await anext(lines)
            server.process.send_signal(signal.SIGTERM)
            refused = None
            while refused is None:
                try:
                    late = await client.post("/v1/chat/completions", json=body("y"))
                except httpx.TransportError:
                    break  # it no longer listens: as good a refusal
                if late.status_code != 200:
                    refused = late
            if refused is not None:
                assert refused.status_code == 503 and refused.headers["retry-after"]
            rest = [line async for line in lines if line]
            assert rest[-1] == "data: [DONE]"

    asyncio.run(run())
    assert server.process.wait(PATIENCE) == 0
