"""One model in several processes that share their devices, by the real command and real signals."""

import asyncio
import json
import os
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.certificates import Authority
from tests.support.forms import SCHEMA, is_person
from tests.support.servers import (
    COMMAND,
    ROOT,
    Server,
    environment,
    free_ports,
    running,
    serve_command,
)

pytestmark = pytest.mark.slow
PATIENCE = 120.0
PROMPTS = ("hi", "What is the capital of France?", "a", "Zebras", "one two three", "x" * 90)


@dataclass
class Follower:
    process: "subprocess.Popen[str]"  # the supervisor
    said: list[str] = field(default_factory=list)

    @property
    def service(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def told(self, words: str) -> bool:
        return any(words in line for line in list(self.said))


@dataclass
class Group:
    leader: Server
    followers: list[Follower]


@contextmanager
def following(options: list[str], devices: int) -> Iterator[Follower]:
    process = subprocess.Popen(
        [COMMAND, "serve", "--model", "tiny-random", *options],
        cwd=ROOT,
        env=environment(JAX_NUM_CPU_DEVICES=str(devices)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    follower = Follower(process)
    reader = threading.Thread(target=follower.said.extend, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        yield follower
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)
        reader.join(5)
        process.stdout.close()


@contextmanager
def group(count: int, devices: int, *options: str) -> Iterator[Group]:
    """So many processes, each with so many devices."""
    address = f"127.0.0.1:{free_ports(2)[0]}"
    flags = ["--coordinator", address, "--num-processes", str(count), *options]
    with ExitStack() as stack:
        followers = [
            stack.enter_context(following([*flags, "--process-id", str(i)], devices))
            for i in range(1, count)
        ]
        command = serve_command("tiny-random", *flags, "--process-id", "0")
        server = stack.enter_context(running(command, JAX_NUM_CPU_DEVICES=str(devices)))
        yield Group(server, followers)


def answers(server: Server) -> list[str]:
    """To greedy, seeded and penalised requests, all at once."""
    ways: list[dict[str, object]] = [
        {"temperature": 0},
        {"temperature": 1, "seed": 7},
        {"temperature": 0.8, "seed": 3, "top_p": 0.9, "frequency_penalty": 0.5, "n": 2},
    ]

    async def ask() -> list[str]:
        async with httpx.AsyncClient(
            base_url=server.url, headers={"api-key": server.key}, timeout=PATIENCE
        ) as client:
            asked = [
                client.post("/v1/chat/completions", json={**body(words, 24), **way})
                for words in PROMPTS
                for way in ways
            ]
            replies = [reply.raise_for_status().json() for reply in await asyncio.gather(*asked)]
        return [one["message"]["content"] for reply in replies for one in reply["choices"]]

    return asyncio.run(ask())


def structured_answers(server: Server) -> list[object]:
    """A person and a call of a function, hot, beside a free answer.

    Each is checked here: what a model with random weights draws is neither without its masks.
    """
    switch = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    function = {"name": "set", "parameters": switch}
    asked: list[dict[str, object]] = [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "person", "schema": SCHEMA, "strict": True},
            },
            "n": 2,
        },
        {
            "tools": [{"type": "function", "function": function}],
            "tool_choice": "required",
            "parallel_tool_calls": False,
        },
        {"ignore_eos": True, "max_tokens": 40},
    ]

    async def ask() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(
            base_url=server.url, headers={"api-key": server.key}, timeout=PATIENCE
        ) as client:
            hot = {**body("Who?", 110), "ignore_eos": False, "temperature": 1.5, "seed": 5}
            replies = await asyncio.gather(
                *(client.post("/v1/chat/completions", json={**hot, **more}) for more in asked)
            )
        return [reply.raise_for_status().json() for reply in replies]

    person, call, free = asyncio.run(ask())
    answers: list[object] = []
    for choice in person["choices"]:
        assert choice["finish_reason"] == "stop" and is_person(choice["message"]["content"])
        answers.append(choice["message"]["content"])
    (choice,) = call["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (called,) = choice["message"]["tool_calls"]
    assert called["function"]["name"] == "set"
    assert json.loads(called["function"]["arguments"]) in ({"on": True}, {"on": False})
    answers.append(called["function"])
    return [*answers, free["choices"][0]["message"]["content"], call["usage"], person["usage"]]


def body(words: str, max_tokens: int) -> dict[str, object]:
    message = {"role": "user", "content": words}
    return {"messages": [message], "ignore_eos": True, "max_tokens": max_tokens}


@dataclass
class Alone:
    """What a model in one process answers."""

    texts: list[str]
    structured: list[object]


@pytest.fixture(scope="module")
def alone() -> Alone:
    with running(serve_command("tiny-random")) as server:
        return Alone(answers(server), structured_answers(server))


@pytest.mark.soak
def test_masks_travel_between_processes(alone: Alone) -> None:
    """An object after a schema and a call, each drawn under masks that the leader has made."""
    with group(2, 1, "--mesh", "data=1,expert=2,tensor=1") as group_:
        assert structured_answers(group_.leader) == alone.structured
        (follower,) = group_.followers
        assert follower.process.poll() is None and not follower.told("started again")


@pytest.mark.soak
@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [
        (2, 2, ["--mesh", "data=1,expert=2,tensor=2"]),
        (2, 2, ["--mesh", "data=2,expert=2,tensor=1", "--dp-attention"]),
        (4, 1, ["--mesh", "auto"]),
    ],
)
def test_several_processes_give_the_tokens_of_one(
    count: int, devices: int, mesh: list[str], alone: Alone
) -> None:
    with group(count, devices, *mesh) as group_:
        assert answers(group_.leader) == alone.texts
        assert structured_answers(group_.leader) == alone.structured
        # Told to end, the leader ends all, and nobody is started again.
        assert group_.leader.stop(signal.SIGTERM) == 0
        for follower in group_.followers:
            assert follower.process.wait(PATIENCE) == 0
            assert not follower.told("started again")


@pytest.mark.soak
def test_processes_with_certificates_make_a_group_of_their_own(tmp_path: Path) -> None:
    """HTTPS before the gateway, and TLS behind it and between the processes."""
    authority = Authority(tmp_path, "authority")
    files = authority.issue("both")
    flags = [f"--tls-cert={files.cert}", f"--tls-key={files.key}"]
    with group(2, 1, *flags, f"--tls-client-ca={authority.ca}") as group_:
        answer = httpx.post(
            f"{group_.leader.url}/v1/chat/completions",
            json=body("hi", 4),
            headers={"api-key": group_.leader.key},
            verify=ssl.create_default_context(cafile=str(authority.ca)),
            timeout=PATIENCE,
        )
        assert answer.json()["usage"]["completion_tokens"] == 4
        assert group_.leader.stop(signal.SIGTERM) == 0


@pytest.mark.soak
def test_a_killed_process_ends_the_streams_and_the_group_comes_back(alone: Alone) -> None:
    """First the follower and, with MIXTRAL_JAX_SOAK=1, then the leader, each under load."""
    with group(2, 2, "--mesh", "data=1,expert=2,tensor=2") as group_:
        # Masks travel to the follower: an object after a schema, and a call of a function.
        assert structured_answers(group_.leader) == alone.structured
        (follower,) = group_.followers
        leader = psutil.Process(group_.leader.process.pid)
        assert kill_under_load(group_.leader, follower.service) < 5.0
        until_back(group_.leader)
        assert any("process 1 of 2 at" in line for line in group_.leader.said)
        if "MIXTRAL_JAX_SOAK" in os.environ:
            (service,) = [child for child in leader.children() if "serving" in child.cmdline()]
            assert kill_under_load(group_.leader, service) < 5.0
            until_back(group_.leader)
            lost = [line for line in follower.said if "was lost; the group starts again" in line]
            assert len(lost) == 1 and "process 0 of 2 at" in lost[0]
        assert answers(group_.leader) == alone.texts


@pytest.mark.soak
def test_a_process_that_stands_still_is_lost_too() -> None:
    """As a machine that vanishes it closes nothing: only pings tell. Its supervisor kills it."""
    with group(2, 1, "--mesh", "data=1,expert=2,tensor=1") as group_:
        (follower,) = group_.followers
        still = follower.service
        assert kill_under_load(group_.leader, still, signal.SIGSTOP) < 12.0
        until_back(group_.leader)
        assert follower.told("the follower has not moved for 15 s; it is killed")


def kill_under_load(
    server: Server, victim: psutil.Process, number: signal.Signals = signal.SIGKILL
) -> float:
    """Seconds until the last of 16 streams has ended; each must end as one that is broken."""

    async def stream(client: httpx.AsyncClient, begun: asyncio.Semaphore) -> float:
        words = {**body("x", 480), "stream": True}
        with pytest.raises(httpx.TransportError):
            async with client.stream("POST", "/v1/chat/completions", json=words) as answer:
                assert answer.status_code == 200, await answer.aread()
                is_first = True
                async for line in answer.aiter_lines():
                    assert line != "data: [DONE]"
                    if is_first and line:
                        is_first = False
                        begun.release()
        return time.monotonic()

    async def run() -> float:
        begun = asyncio.Semaphore(0)
        async with httpx.AsyncClient(
            base_url=server.url, headers={"api-key": server.key}, timeout=PATIENCE
        ) as client:
            streams = [asyncio.create_task(stream(client, begun)) for _ in range(16)]
            for _ in streams:
                await asyncio.wait_for(begun.acquire(), PATIENCE)
            killed = time.monotonic()
            victim.send_signal(number)
            return max(await asyncio.gather(*streams)) - killed

    return asyncio.run(run())


def until_back(server: Server) -> None:
    """Until it answers again; until then it must say that a retry helps."""
    deadline = time.monotonic() + PATIENCE
    with httpx.Client(
        base_url=server.url, headers={"api-key": server.key}, timeout=PATIENCE
    ) as client:
        while True:
            answer = client.post("/v1/chat/completions", json=body("x", 2))
            if answer.status_code == 200:
                return
            assert answer.status_code == 503 and answer.headers["retry-after"], answer.text
            assert time.monotonic() < deadline
            time.sleep(0.3)


@pytest.mark.soak
def test_a_follower_that_is_told_to_end_ends_the_group() -> None:
    with group(2, 1, "--mesh", "data=1,expert=2,tensor=1") as group_:
        (follower,) = group_.followers
        follower.process.send_signal(signal.SIGINT)
        assert follower.process.wait(PATIENCE) == 0
        assert group_.leader.process.wait(PATIENCE) == 0
        assert follower.told("was told to end; the group has ended")


def test_who_is_started_otherwise_is_told_so_and_not_taken_in() -> None:
    address, _, port, grpc_port = free_ports(4)
    flags = ["--coordinator", f"127.0.0.1:{address}", "--num-processes", "2"]
    ports = [f"--port={port}", f"--grpc-port={grpc_port}"]
    with (
        following([*flags, "--process-id", "0", "--no-auth", *ports], 1) as leader,
        following([*flags, "--process-id", "1", "--dtype", "int8"], 1) as follower,
    ):
        assert follower.process.wait(PATIENCE) == 1
        why = "--dtype is int8 in process 1 and float32 in process 0"
        deadline = time.monotonic() + PATIENCE
        while not (follower.told(f"process 0 refuses this one: {why}") and leader.told(why)):
            assert time.monotonic() < deadline  # threads read what is said
            time.sleep(0.1)
        assert leader.process.poll() is None
