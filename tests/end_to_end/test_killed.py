"""Clients that vanish and processes that die, by real signals, under a real server's load."""

import asyncio
import dataclasses
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from mixtral_jax.checkpoint.pretrained import save
from mixtral_jax.config import ModelConfig
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from serving.access.key_file import KeyFile
from tests.support import lost_device, poison
from tests.support.models import model_of
from tests.support.servers import Server, free_ports, running, serve_command

pytestmark = pytest.mark.slow
PATIENCE = 120.0
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
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE).text
        for line in text.splitlines():
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


def test_clients_that_vanish_leave_nothing_behind() -> None:
    """Two hundred of them, 500 with MIXTRAL_JAX_SOAK=1."""
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
        for _ in range(10 if "MIXTRAL_JAX_SOAK" in os.environ else 4):
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


@dataclass
class Counted:
    """What the clients of one caller have counted."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Callers:
    """Four callers with a key each, who count every token that they get."""

    def __init__(self, server: Server, keys: dict[str, str]) -> None:
        self.counted = {name: Counted() for name in keys}
        self._server, self._keys = server, keys
        self._numbers = iter(range(1000, 10_000))  # prompts differ, and are of one length

    def client(self, key: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self._server.url,
            headers={"api-key": key},
            timeout=PATIENCE,
            trust_env=False,
            limits=httpx.Limits(max_connections=None),
        )

    async def ask(self, name: str) -> httpx.Response:
        """Asks for two tokens."""
        async with self.client(self._keys[name]) as client:
            answer = await client.post(
                "/v1/chat/completions",
                json=body(f"{next(self._numbers)}", stream=False, max_tokens=2),
            )
        if answer.status_code == 200:
            usage, counted = answer.json()["usage"], self.counted[name]
            counted.requests += 1
            counted.prompt_tokens += usage["prompt_tokens"]
            counted.completion_tokens += usage["completion_tokens"]
        return answer

    async def stream(self, name: str, prompt_tokens: int, running: list[int]) -> float | None:
        """Returns when a stream of 8 has broken off; None if all of its tokens had come before.

        A client that is slower than the engine may read the end of an answer after the signal.
        """
        counted, num_tokens, is_broken, is_whole = self.counted[name], 0, False, False
        asked = body(f"{next(self._numbers)}", max_tokens=TOKENS, logprobs=True)
        async with self.client(self._keys[name]) as client:
            try:
                async with client.stream("POST", "/v1/chat/completions", json=asked) as answer:
                    assert answer.status_code == 200, await answer.aread()
                    async for line in answer.aiter_lines():
                        is_whole = is_whole or line == "data: [DONE]"
                        if not line.startswith("data: {"):
                            continue
                        event = json.loads(line.removeprefix("data: "))
                        is_broken = is_broken or "error" in event
                        for choice in event.get("choices", ()):
                            tokens = (choice.get("logprobs") or {}).get("content") or ()
                            running[0] -= num_tokens == 0 and len(tokens) > 0
                            num_tokens += len(tokens)
            except httpx.TransportError:
                is_broken = True
        assert is_broken != is_whole
        assert is_broken or num_tokens == TOKENS, "the stream ended as if it were whole"
        counted.requests += 1
        counted.prompt_tokens += prompt_tokens
        counted.completion_tokens += num_tokens
        return time.monotonic() if is_broken else None

    async def until_back(self, name: str) -> None:
        """Meanwhile it says so, and that a retry helps; then it is there again by itself."""
        deadline = time.monotonic() + PATIENCE
        while (answer := await self.ask(name)).status_code != 200:
            assert answer.status_code in (424, 503), answer.text
            assert answer.status_code == 424 or answer.headers["retry-after"]
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)

    async def check_ledger(self) -> None:
        """Compares what the server says that each has used with what each has counted."""
        async with self.client(self._server.key) as client:
            rows = (await client.get("/usage", params={"all": "true"})).json()["data"]
        told = {name: Counted() for name in self._keys}
        for row in rows:
            told[row["caller"]].requests += row["requests"]
            told[row["caller"]].prompt_tokens += row["prompt_tokens"]
            told[row["caller"]].completion_tokens += row["completion_tokens"]
        assert told == self.counted


async def until_said(server: Server, words: str, times: int) -> None:
    """Waits until some words stand so often in what the server has said since its banner."""
    deadline = time.monotonic() + PATIENCE
    while sum(words in line for line in list(server.said)) < times:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


TOKENS = 3000  # of each stream, more than come before the signal
# The signal, and the seconds after which all streams must have ended. Within 9 s only the break
# itself tells: the gateway's pings begin after 10 s. A service that stands still is killed by its
# supervisor, which says so.
WAYS = {
    "killed": (signal.SIGKILL, 9.0),
    "stopped": (signal.SIGSTOP, 20.0),
    "its device is lost": (signal.SIGURG, 9.0),
}


@pytest.mark.timeout(3600)
def test_a_service_that_dies_or_stands_still_ends_32_streams_and_comes_back(
    tmp_path: Path,
) -> None:
    """Each way once, ten times with MIXTRAL_JAX_SOAK=1; no token is charged that nobody got."""
    names = ["ann", "ben", "cid", "dora"]
    keys = {name: KeyFile(tmp_path / "keys.json").add(name) for name in names}
    options = [f"--keys={tmp_path / 'keys.json'}", "--usage-db=:memory:", "--step-timeout=5"]
    (tmp_path / "path").mkdir()
    variables = lost_device.environment_for(tmp_path / "path")
    tokenizer = ByteTokenizer()
    config = ModelConfig.tiny(vocab_size=tokenizer.vocab_size)
    long = dataclasses.replace(config, sliding_window=None, max_context=TOKENS + 100)
    save(model_of(long), tokenizer, tmp_path / "model")

    async def run(server: Server) -> None:
        callers = Callers(server, keys)
        first = (await callers.ask("ann")).raise_for_status().json()
        prompt_tokens = first["usage"]["prompt_tokens"]
        for turn in range(10 if "MIXTRAL_JAX_SOAK" in os.environ else 1):
            for way, (number, seconds) in WAYS.items():
                running = [32]
                streams = [
                    asyncio.create_task(callers.stream(name, prompt_tokens, running))
                    for name in names * 8
                ]
                while running[0] > 0:
                    await asyncio.sleep(0.05)
                    assert not any(one.done() and one.exception() for one in streams)
                began = time.monotonic()
                service_of(server).send_signal(number)
                ends = [end for end in await asyncio.gather(*streams) if end is not None]
                lasted = max(ends) - began
                print(f"{way}: {lasted:.2f} s until the last of {len(ends)} streams ended")
                assert len(ends) > 16 and lasted < seconds, way
                if number == signal.SIGSTOP:
                    await until_said(server, "the service has not moved for", turn + 1)
                await callers.until_back("ann")
                print(f"{way}: back after {time.monotonic() - began:.1f} s")
                await callers.check_ledger()

    with running(serve_command(tmp_path / "model", *options), **variables) as server:
        asyncio.run(run(server))


@pytest.mark.soak
def test_a_request_that_kills_the_service_is_found_and_refused(tmp_path: Path) -> None:
    """Three others are aboard each time, and come again as it does; they are answered at last."""

    async def persist(client: httpx.AsyncClient, **parameters: object) -> list[int]:
        """Asks until the answer is not that it should be tried again; returns all statuses."""
        statuses: list[int] = []
        deadline = time.monotonic() + 2 * PATIENCE
        while not statuses or statuses[-1] == 503:
            assert time.monotonic() < deadline
            answer = await client.post(
                "/v1/chat/completions", json=body("x", stream=False, **parameters)
            )
            statuses.append(answer.status_code)
            await asyncio.sleep(0.3)
        return statuses

    async def run(server: Server) -> None:
        async with httpx.AsyncClient(
            base_url=server.url, headers={"api-key": server.key}, timeout=PATIENCE, trust_env=False
        ) as client:
            bystanders = [
                asyncio.create_task(persist(client, max_tokens=300 + i)) for i in range(3)
            ]
            await asyncio.sleep(1.0)
            assert (await persist(client, seed=poison.SEED))[-1] == 424
            for bystander in bystanders:
                assert (await bystander)[-1] == 200
            again = await client.post(
                "/v1/chat/completions", json=body("x", stream=False, seed=poison.SEED)
            )
            assert again.status_code == 424 and "died when it answered" in again.text

    with running(serve_command("tiny-random"), **poison.environment_for(tmp_path)) as server:
        asyncio.run(run(server))
        deaths = [line for line in list(server.said) if "ended with SIGKILL" in line]
        assert 2 <= len(deaths) <= 3, deaths


@pytest.mark.soak
def test_a_gateway_that_stands_still_is_killed_and_comes_back(server: Server) -> None:
    """It does not answer six questions, one each 10 s."""
    (gateway,) = [
        child
        for child in psutil.Process(server.process.pid).children()
        if "serving.gateway" in child.cmdline()
    ]
    gateway.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + PATIENCE
    while not any("the gateway did not answer 6 times; it is killed" in s for s in server.said):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    while True:
        try:
            if httpx.get(f"{server.url}/health/ready", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.2)


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
