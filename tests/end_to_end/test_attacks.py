"""Attacks on a real server, each with a bystander who must not notice.

One server stands for all of them. Nothing is timed here but in the tests that are marked `soak`.
"""

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.proto import inference_pb2 as pb
from tests.support.bystander import (
    ATTACKER,
    CONTEXT,
    PATIENCE,
    POOR,
    POOR_TOKENS,
    Bystander,
    Endpoint,
    attacked,
    endpoint,
)

pytestmark = pytest.mark.slow
HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
)


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with endpoint(tmp_path_factory.mktemp("attacks")) as victim:
        yield victim


def taken(port: int, head: bytes, piece: bytes, most: int) -> int:
    """Sends `head`, then `piece` again and again; returns the bytes until the connection's end.

    The system's buffers take some hundred kilobytes that no server has read.
    """
    sent = 0
    with socket.create_connection(("127.0.0.1", port)) as link, suppress(OSError):
        link.settimeout(PATIENCE)
        link.sendall(head)
        while sent < most:
            link.sendall(piece)
            sent += len(piece)
    return sent


def chat(content: str = "hi", **parameters: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **parameters}


def grpc_chat(**fields: Any) -> pb.GenerateRequest:
    message = pb.ChatMessage(role="user", content="hi")
    return pb.GenerateRequest(chat=pb.Chat(messages=[message]), **fields)


def test_trailers_without_end(victim: Endpoint) -> None:
    """A gigabyte of them, without a key: they end with a few megabytes at most."""
    head = HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    with attacked(victim):
        for trailer in (b"x-%s: %s\r\n" % (b"a" * 20, b"b" * 8000), b"b" * 65_536):
            assert taken(victim.port, head + b"x: ", trailer, 2**30) < 16 * 2**20


def test_heads_without_end(victim: Endpoint) -> None:
    with attacked(victim):
        for piece in (b"x-%s: b\r\n" % (b"a" * 1000), b"a" * 65_536):
            assert taken(victim.port, HEAD, piece, 2**30) < 16 * 2**20


def test_a_thousand_idle_connections(victim: Endpoint) -> None:
    with attacked(victim) as bystander:
        links = []
        try:
            for _ in range(1000):
                links.append(socket.create_connection(("127.0.0.1", victim.port)))
            bystander.wait_for_answers(3)
        finally:
            for link in links:
                link.close()


def _fields() -> list[tuple[str, str]]:
    """Every field of the bodies of both routes, and a route that has it."""
    from serving.gateway.dialect.chat.request import ChatRequest
    from serving.gateway.dialect.text.request import CompletionRequest

    kinds = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}
    # A field of both is tried on one of them: it has one type.
    fields = {name: path for path, kind in kinds.items() for name in kind.model_fields}
    return [(path, name) for name, path in fields.items()]


def test_4_mb_of_wrong_values_in_every_field(victim: Endpoint) -> None:
    """A list of two million numbers is refused in a short answer, wherever it stands."""
    values = b"[" + b"1," * (2 * 2**20 - 1000) + b"1]"
    with attacked(victim), victim.client(ATTACKER) as client:
        for path, name in _fields():
            good = chat() if "chat" in path else {"prompt": "hi"}
            others = {key: value for key, value in good.items() if key != name} | {"user": "me"}
            start = json.dumps(others)[:-1].encode()
            body = start + b', "%s": ' % name.encode() + values + b"}"
            answer = client.post(path, content=body)
            assert answer.status_code in (400, 413, 422), (name, answer.text)
            assert len(answer.content) < 8192, name


def test_400_000_stop_texts(victim: Endpoint) -> None:
    stops = [f"{i:x}" for i in range(400_000)]
    with attacked(victim):
        with victim.client(ATTACKER) as client:
            for body in (chat(stop=stops, n=16), {"prompt": ["hi"] * 16, "stop": stops, "n": 16}):
                path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
                assert client.post(path, json=body).status_code in (400, 422)
        with victim.stub(ATTACKER) as (stub, metadata):
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Generate(grpc_chat(stop=stops[:17]), metadata=metadata))
            assert "stop has 17 texts" in caught.value.details()  # type: ignore[attr-defined]
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Generate(grpc_chat(stop=stops, n=16), metadata=metadata))
            assert "more than 16,384 fields" in caught.value.details()  # type: ignore[attr-defined]


def test_256_choices_of_one_request(victim: Endpoint) -> None:
    """The bystander has its answers while those of the attacker still run."""
    body = {
        "prompt": [f"{i} dwarfs" for i in range(16)], "n": 16, "max_tokens": 64,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip
    with (
        attacked(victim) as bystander,
        victim.client(ATTACKER) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        if answer.status_code == 200:
            lines = answer.iter_lines()
            next(lines)
            bystander.wait_for_answers(5)
            assert sum(1 for _ in lines) > 100, "the attack was over before"
        else:
            assert answer.status_code in (400, 422, 429)


def test_six_prompts_of_600_kb_of_digits(victim: Endpoint) -> None:
    """And as many that are just short enough to be tokenized: all are too long, and none waits."""
    prompts = ["7" * 600_000] * 6 + ["7" * (CONTEXT * 16 - 100)] * 6
    with (
        attacked(victim) as bystander,
        victim.client(ATTACKER) as client,
        ThreadPoolExecutor(6) as pool,
    ):
        bodies = [chat(prompt, max_tokens=1) for prompt in prompts]
        sent = [pool.submit(client.post, "/v1/chat/completions", json=body) for body in bodies]
        bystander.wait_for_answers(2)
        assert {answer.result().status_code for answer in sent} <= {400, 429}


def test_millions_of_token_ids(victim: Endpoint) -> None:
    with attacked(victim), victim.stub(ATTACKER) as (stub, metadata):
        for count in (4_000_000, 8_000_000):
            ids = pb.TokenIds(ids=[1] * count)
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Generate(pb.GenerateRequest(token_ids=ids), metadata=metadata))
            status = caught.value.code()  # type: ignore[attr-defined]
            assert status in (
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.RESOURCE_EXHAUSTED,  # more bytes than a message may have
            )


def test_messages_of_4_mb(victim: Endpoint) -> None:
    """Each is refused after it was read, and takes no memory from then on."""
    with attacked(victim), victim.stub(ATTACKER) as (stub, metadata), ThreadPoolExecutor(8) as pool:

        def ask(number: int) -> str:
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Generate(grpc_chat(stop=["x" * 1000] * 4000), metadata=metadata))
            return str(caught.value.code().name)  # type: ignore[attr-defined]

        assert set(pool.map(ask, range(120))) == {"INVALID_ARGUMENT"}


def test_detokenize_of_4_million_ids(victim: Endpoint) -> None:
    with attacked(victim), victim.stub(ATTACKER) as (stub, metadata):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Detokenize(pb.DetokenizeRequest(ids=[1] * 4_000_000), metadata=metadata)
        assert "ids has 4,000,000 ids" in caught.value.details()  # type: ignore[attr-defined]


def test_logprobs_of_16_long_choices(victim: Endpoint) -> None:
    """11 MB of JSON in one piece."""
    body = chat(n=16, logprobs=True, top_logprobs=20, max_tokens=512, ignore_eos=True)
    with (
        attacked(victim) as bystander,
        victim.client(ATTACKER) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        sent = pool.submit(client.post, "/v1/chat/completions", json=body)
        bystander.wait_for_answers(3)
        answer = sent.result()
        assert answer.status_code in (200, 400, 422)
        if answer.status_code == 200:
            assert answer.json()["usage"]["completion_tokens"] == 16 * 512


def test_a_storm_of_aborts(victim: Endpoint) -> None:
    """300 requests whose clients reset their connection at any moment of them."""
    payload = json.dumps(chat("a long story " * 50, max_tokens=200, n=4, stream=True)).encode()
    key = victim.keys[ATTACKER].encode()
    head = HEAD + b"authorization: Bearer %s\r\ncontent-length: %d\r\n\r\n" % (key, len(payload))

    async def storm() -> None:
        async def abort(number: int) -> None:
            _, writer = await asyncio.open_connection("127.0.0.1", victim.port)
            writer.write((head + payload)[: len(head) + (len(payload) * (number % 5)) // 4])
            await asyncio.sleep(0.01 * (number % 7))
            writer.transport.abort()

        for start in range(0, 300, 30):
            await asyncio.gather(*(abort(number) for number in range(start, start + 30)))

    with attacked(victim):
        asyncio.run(storm())


def test_retries_under_overload(victim: Endpoint) -> None:
    """A caller that sends 400 requests at once, and each again as soon as it is refused."""

    async def insist(client: httpx.AsyncClient, statuses: list[int]) -> None:
        for _ in range(3):
            answer = await client.post("/v1/chat/completions", json=chat(max_tokens=8, n=2))
            statuses.append(answer.status_code)
            if answer.status_code == 200:
                break

    async def run() -> list[int]:
        statuses: list[int] = []
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=victim.server.url,
            headers=victim.headers(ATTACKER),
            timeout=PATIENCE,
            trust_env=False,
            limits=limits,
        ) as client:
            await asyncio.gather(*(insist(client, statuses) for _ in range(400)))
        return statuses

    with attacked(victim):
        statuses = asyncio.run(run())
    assert set(statuses) <= {200, 429} and statuses.count(200) >= 32, statuses


def test_a_chat_that_renders_to_nothing(victim: Endpoint) -> None:
    body = {"messages": [{"role": "system", "content": "Be brief."}], "max_tokens": 4}
    with attacked(victim), victim.client(ATTACKER) as client:
        for _ in range(5):
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 400, answer.text
            assert "makes no text of these messages" in answer.text


def test_32_at_once_under_a_limit_of_50_tokens_a_minute(victim: Endpoint) -> None:
    body = chat(max_tokens=16, ignore_eos=True)
    with attacked(victim), victim.client(POOR) as client, ThreadPoolExecutor(32) as pool:
        sent = [pool.submit(client.post, "/v1/chat/completions", json=body) for _ in range(32)]
        answers = [answer.result() for answer in sent]
    good = [answer.json()["usage"] for answer in answers if answer.status_code == 200]
    assert sum(usage["total_tokens"] for usage in good) <= POOR_TOKENS
    assert {answer.status_code for answer in answers} <= {200, 429}


def test_watches_and_heads_without_a_key(victim: Endpoint) -> None:
    """1,500 watches of the health, and as many calls whose request never comes."""
    request = health_pb2.HealthCheckRequest()

    async def run() -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(victim.server.target, options=options) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            head = channel.stream_unary("/mixtral.v1.Inference/GetModelInfo")
            for _ in range(3):
                watches = [stub.Watch(request) for _ in range(500)]
                heads = [head() for _ in range(500)]
                read = await asyncio.gather(
                    *(watch.read() for watch in watches), return_exceptions=True
                )
                refused = [item for item in read if isinstance(item, grpc.aio.AioRpcError)]
                assert len(refused) >= 500 - 64
                ends = await asyncio.gather(*heads, return_exceptions=True)
                assert {end.code() for end in ends} == {grpc.StatusCode.UNAUTHENTICATED}

    with attacked(victim):
        asyncio.run(run())


ATTACKS: list[Callable[[Endpoint], None]] = [
    test_trailers_without_end,
    test_heads_without_end,
    test_a_thousand_idle_connections,
    test_4_mb_of_wrong_values_in_every_field,
    test_400_000_stop_texts,
    test_256_choices_of_one_request,
    test_six_prompts_of_600_kb_of_digits,
    test_millions_of_token_ids,
    test_messages_of_4_mb,
    test_detokenize_of_4_million_ids,
    test_logprobs_of_16_long_choices,
    test_a_storm_of_aborts,
    test_retries_under_overload,
    test_a_chat_that_renders_to_nothing,
    test_32_at_once_under_a_limit_of_50_tokens_a_minute,
    test_watches_and_heads_without_a_key,
]


@pytest.mark.soak
@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.__name__[5:] for attack in ATTACKS])
def test_a_bystander_waits_no_longer(victim: Endpoint, attack: Callable[[Endpoint], None]) -> None:
    """A small chat each 100 ms: of 100, the one that waits longest but one, in quiet and under
    attack."""
    with Bystander(victim, every=0.1) as bystander:
        bystander.wait_for_answers(100)
        quiet = sorted(bystander.first_tokens[:100])[-2]
        bystander.first_tokens.clear()
        while len(bystander.first_tokens) < 100:
            attack(victim)
        times = sorted(bystander.first_tokens)
    p99 = times[int(0.99 * len(times)) - 1]
    print(f"{attack.__name__}: p99 {p99:.3f} s of {len(times)}, in quiet {quiet:.3f} s")
    assert p99 <= 3 * quiet
