"""A rollout without Kubernetes: replicas are replaced one after the other, and no request fails."""

import asyncio
import os
from collections import Counter

import httpx
import pytest

from tests.support.replicas import API_KEY, Deployment, deployment

pytestmark = pytest.mark.slow
PATIENCE = 60.0
CALL = "serving.service.call_log: .*Generate.*status=OK"


async def ask(client: httpx.AsyncClient, number: int) -> str:
    """Asks for a short answer, whole or as a stream in turn; returns "whole" or what went wrong."""
    body = {
        "messages": [{"role": "user", "content": f"hello {number}"}],
        "max_tokens": 1 + number % 40,
        "ignore_eos": True,
        "stream": number % 2 == 0,
    }
    try:
        answer = await client.post("/v1/chat/completions", json=body)
    except httpx.HTTPError as error:
        return repr(error)
    if answer.status_code != 200:
        return f"{answer.status_code} {answer.text}"
    is_whole = answer.text.rstrip().endswith("data: [DONE]") if body["stream"] else answer.json()
    return "whole" if is_whole else f"broken: {answer.text[-200:]}"


async def load(url: str, stop: asyncio.Event, outcomes: "Counter[str]") -> None:
    """Asks one request after the other, with eight clients at once, until told to stop."""
    headers = {"api-key": API_KEY}
    numbers = iter(range(10**9))

    async def client() -> None:
        async with httpx.AsyncClient(
            base_url=url, headers=headers, timeout=PATIENCE, trust_env=False
        ) as asking:
            while not stop.is_set():
                outcomes[await ask(asking, next(numbers))] += 1
                await asyncio.sleep(0.05)  # a new replica needs the processors to come up

    await asyncio.gather(*(client() for _ in range(8)))


def replace_each(running: Deployment, rounds: int) -> None:
    """Replaces each replica in turn; the next one when the gateway asks the new one again."""
    for _ in range(rounds):
        for number in range(len(running.replicas)):
            assert running.replicas[number].end() == 0
            new = running.start(number)
            new.until("ready on")
            new.until(CALL)


@pytest.mark.soak
def test_each_replica_is_replaced_under_load_and_no_request_fails() -> None:
    """Three times with MIXTRAL_JAX_SOAK=1."""
    rounds = 3 if "MIXTRAL_JAX_SOAK" in os.environ else 1

    async def run(running: Deployment) -> "Counter[str]":
        stop, outcomes = asyncio.Event(), Counter[str]()
        loading = asyncio.create_task(load(running.url, stop, outcomes))
        async with asyncio.timeout(PATIENCE):
            while outcomes["whole"] < 16:
                await asyncio.sleep(0.05)
        await asyncio.to_thread(replace_each, running, rounds)
        stop.set()
        await loading
        return outcomes

    with deployment(2) as running:
        outcomes = asyncio.run(run(running))
    print(outcomes)
    assert list(outcomes) == ["whole"] and outcomes["whole"] > 32
