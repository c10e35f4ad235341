"""A service of several text processes, of which one is killed in the middle of its answers."""

import asyncio
import contextlib
import json
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest

from serving.access.key_file import KeyFile
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc as rpc
from tests.end_to_end.test_hosts import answers as hosts_answers
from tests.end_to_end.test_hosts import group
from tests.end_to_end.test_killed import PATIENCE, body, figures, service_of
from tests.support.servers import Server, free_ports, running, serve_command

pytestmark = pytest.mark.slow
TOKENS = 450  # of each answer
NAMES = ("ann", "ben")
STREAMS = 16


@dataclass
class Answer:
    """Everything that a client got of an answer."""

    caller: str
    words: list[object] = field(default_factory=list)  # one for each token
    is_whole: bool = False


def texts_of(server: Server) -> list[psutil.Process]:
    """Returns the text processes of a server that listen."""
    found = []
    for child in service_of(server).children():
        with contextlib.suppress(psutil.Error):  # it may end meanwhile
            is_text = "serving.launch.text_process" in child.cmdline()
            if is_text and any(one.status == "LISTEN" for one in child.net_connections("tcp")):
                found.append(child)
    return found


def until_both_listen(server: Server) -> None:
    """Waits until there are two: the second may come later than the banner, or the first answer."""
    deadline = time.monotonic() + PATIENCE
    while len(texts_of(server)) != 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)


async def over_http(server: Server, key: str, number: int, answer: Answer) -> None:
    """Asks the gateway for an answer of its own number, and notes all of it that comes."""
    asked = body(f"say {number:02d}", max_tokens=TOKENS, seed=number, logprobs=True)
    headers = {"api-key": key}
    async with httpx.AsyncClient(
        # To read certificates would take longer than an answer.
        base_url=server.url,
        headers=headers,
        timeout=PATIENCE,
        trust_env=False,
        verify=False,
    ) as client:
        # A stream that breaks off ends without its last chunk of HTTP.
        with contextlib.suppress(httpx.RemoteProtocolError):
            async with client.stream("POST", "/v1/chat/completions", json=asked) as lines:
                assert lines.status_code == 200, await lines.aread()
                async for line in lines.aiter_lines():
                    answer.is_whole = answer.is_whole or line == "data: [DONE]"
                    if line.startswith("data: {"):
                        answer.words += _words(json.loads(line.removeprefix("data: ")))


def _words(event: dict[str, Any]) -> list[object]:
    """Returns the tokens of an event, each with its logprob."""
    return [
        (token["bytes"], token["logprob"])
        for choice in event.get("choices", ())
        for token in (choice.get("logprobs") or {}).get("content") or ()
    ]


async def over_grpc(server: Server, key: str, number: int, answer: Answer) -> None:
    """Asks the service itself, by a connection of its own, which one of the processes gets."""
    asked = pb.GenerateRequest(text=f"say {number:02d}", max_tokens=TOKENS, ignore_eos=True)
    asked.sampling.seed = number
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(server.target, options=options) as channel:
        metadata = (("authorization", f"Bearer {key}"),)
        try:
            async for chunk in rpc.InferenceStub(channel).Generate(asked, metadata=metadata):
                answer.words += chunk.token_ids
                answer.is_whole = answer.is_whole or bool(chunk.finish_reason)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error


async def until_free(metrics_port: int) -> dict[str, float]:
    """Waits until no request holds a page; returns the service's figures."""
    deadline = time.monotonic() + PATIENCE
    while True:
        now = await asyncio.to_thread(figures, [metrics_port])
        if now["mixtral_free_pages"] == now["mixtral_pages"]:
            return now
        assert time.monotonic() < deadline, now
        await asyncio.sleep(0.1)


async def used(server: Server) -> dict[str, tuple[int, int]]:
    """Returns the requests and the tokens of answers that the ledger has of each caller."""
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=PATIENCE) as client:
        headers = {"api-key": server.key}
        rows = (await client.get("/usage", params={"all": "true"}, headers=headers)).json()["data"]
    return {row["caller"]: (row["requests"], row["completion_tokens"]) for row in rows}


def holds(charged: dict[str, tuple[int, int]], totals: dict[str, tuple[int, int]]) -> bool:
    """Whether the ledger has at least those requests and tokens of each caller."""
    return all(
        requests <= charged.get(name, (0, 0))[0] and tokens <= charged.get(name, (0, 0))[1]
        for name, (requests, tokens) in totals.items()
    )


def test_a_text_process_that_dies_ends_its_own_streams_alone(tmp_path: Path) -> None:
    """The others' are those of the undisturbed run, bit for bit, and nobody pays for more."""
    keys = {name: KeyFile(tmp_path / "keys.json").add(name) for name in NAMES}
    (port,) = free_ports(1)
    options = [
        *("--service-processes=2", "--deterministic", "--max-sequences=4"),
        f"--metrics-port={port}",
        *(f"--keys={tmp_path / 'keys.json'}", f"--usage-db={tmp_path / 'usage.db'}"),
    ]

    async def run(server: Server) -> None:
        totals = dict.fromkeys(NAMES, (0, 0))
        await asyncio.to_thread(until_both_listen, server)
        for way in (over_http, over_grpc):
            whole: list[Answer] = []
            for is_disturbed in (False, True):
                answers = [Answer(NAMES[i % 2]) for i in range(STREAMS)]
                victim = texts_of(server)[0]
                tasks = [
                    asyncio.create_task(way(server, keys[answer.caller], i, answer))
                    for i, answer in enumerate(answers)
                ]
                if is_disturbed:
                    while sum(len(answer.words) for answer in answers) < STREAMS:
                        await asyncio.sleep(0.001)
                    victim.kill()
                await asyncio.gather(*tasks)
                if not is_disturbed:
                    whole = answers
                broken = [answer for answer in answers if not answer.is_whole]
                print(way.__name__, len(broken), "streams are broken")
                assert bool(broken) == is_disturbed and len(broken) < STREAMS
                for answer, same in zip(answers, whole, strict=True):
                    assert len(same.words) == TOKENS
                    assert answer.words == same.words[: len(answer.words)]
                    assert len(answer.words) == TOKENS or not answer.is_whole
                for answer in answers:
                    requests, tokens = totals[answer.caller]
                    begun = bool(answer.words)  # what has not begun costs nothing
                    totals[answer.caller] = requests + begun, tokens + len(answer.words)
            await until_free(port)
            await asyncio.to_thread(until_both_listen, server)
            # The ledger is written twice a second, if the machine is not busy.
            await asyncio.sleep(1.0)
            deadline = time.monotonic() + 20
            while not holds(charged := await used(server), totals):
                assert time.monotonic() < deadline, (totals, charged)
                await asyncio.sleep(0.1)
            print("counted", totals, "charged", charged)
            for name, (requests, tokens) in totals.items():
                if way is over_http:
                    assert charged[name] == (requests, tokens)
                # Tokens that the killed process had passed on may not have left this machine.
                assert requests <= charged[name][0] <= requests + len(broken)
                assert tokens <= charged[name][1] <= tokens + 20 * len(broken)
                totals[name] = charged[name]

    with running(serve_command("tiny-random", *options)) as server:
        asyncio.run(run(server))


def test_when_the_engines_process_dies_its_text_processes_do_and_all_come_back() -> None:
    with running(serve_command("tiny-random", "--service-processes=2")) as server:
        until_both_listen(server)
        texts = texts_of(server)
        service_of(server).kill()
        psutil.wait_procs(texts, timeout=60)
        assert not any(text.is_running() for text in texts)
        deadline = time.monotonic() + PATIENCE
        while True:
            assert time.monotonic() < deadline
            answer = httpx.post(
                f"{server.url}/v1/completions",
                json={"prompt": "hello", "max_tokens": 3},
                headers={"api-key": server.key},
                trust_env=False,
                timeout=PATIENCE,
            )
            if answer.status_code == 200:
                break
            assert answer.status_code == 503
            time.sleep(0.2)
        until_both_listen(server)


def test_sigterm_to_the_service_lets_the_streams_of_all_processes_finish() -> None:
    async def run(server: Server) -> None:
        answers = [Answer("default") for _ in range(8)]
        tasks = [
            asyncio.create_task(over_http(server, server.key, i, answer))
            for i, answer in enumerate(answers)
        ]
        while min(len(answer.words) for answer in answers) < 5:
            await asyncio.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.gather(*tasks)
        assert all(answer.is_whole and len(answer.words) == TOKENS for answer in answers)

    with running(serve_command("tiny-random", "--service-processes=2")) as server:
        asyncio.run(run(server))
        assert server.process.wait(30) == 0


@pytest.mark.soak  # two groups are started; test_hosts.py has groups, and the rest text processes
def test_the_first_of_several_hosts_has_text_processes_too() -> None:
    """Their answers are those of a group with one process for both."""
    with group(2, 1) as alone:
        expected = hosts_answers(alone.leader)
    with group(2, 1, "--service-processes=2") as several:
        until_both_listen(several.leader)
        assert hosts_answers(several.leader) == expected


def test_a_text_process_starts_without_jax_and_stays_small() -> None:
    with running(serve_command("tiny-random", "--service-processes=3")) as server:
        for text in texts_of(server):
            mapped = {Path(one.path).name for one in text.memory_maps()}
            assert not any(name.startswith(("libjax", "_jax", "xla_extension")) for name in mapped)
            assert text.memory_info().rss < 200 << 20
