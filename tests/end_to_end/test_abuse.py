"""What the internet sends: bodies of all kinds, slow clients, large ones, clients that vanish.

Whatever comes, the answer is 2xx or an error in the one shape, at once and in bounded memory.
"""

import asyncio
import copy
import json
import os
import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import psutil
import pytest

from serving.gateway.dialect.anthropic.error import is_anthropic_path
from serving.gateway.dialect.openai import is_openai_path
from tests.support.fakes import KEY, Stack, running_stack

HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
SOAK = "MIXTRAL_JAX_SOAK" in os.environ
STATUSES = {400, 401, 403, 404, 405, 408, 413, 415, 422, 424, 429, 503}
BODY: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one two"}]},
    ],
    "model": "azureai",
    "temperature": 0.5,
    "top_p": 1,
    "max_tokens": 2,
    "stop": ["x"],
    "seed": 1,
    "stream": True,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "response_format": {"type": "text"},
    "n": 1,
    "logprobs": True,
    "top_logprobs": 2,
    "logit_bias": {"5": 1},
    "stream_options": {"include_usage": True},
    "tools": None,
    "tool_choice": "none",
    "safe_prompt": False,
    "user": "u",
    "top_k": 5,
    "min_p": 0.1,
    "stop_token_ids": [3],
}
MESSAGES = "/v1/messages"
MESSAGES_BODY: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "one two"}]},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "i", "name": "f", "input": {"a": 1}}],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "i", "content": "x", "is_error": False},
                {"type": "text", "text": "one two"},
            ],
        },
    ],
    "system": [{"type": "text", "text": "be brief"}],
    "model": "azureai",
    "temperature": 0.5,
    "top_p": 1,
    "top_k": 5,
    "max_tokens": 2,
    "stop_sequences": ["x"],
    "stream": False,
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "auto"},
    "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "context_management": {"edits": [{"type": "clear_thinking_20251015"}]},
    "metadata": {"user_id": "u"},
}
# Values that something, somewhere, once took badly.
ODDITIES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, -0.0, 0.1,
    1e-320, "", "0", "1", "True", "NaN", "Infinity", "-1", "1e999", "\u0000", "\ud800", "\u202e",
    "é" * 50, "a" * 5000, [], [[]], [None], {}, {"": {}}, {"type": {"type": {"type": "text"}}},
    [{}], [1] * 400, {"a": [{"b": [{}]}]}, {"role": "user"}, [{"role": "user", "content": "hi"}],
    [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}], [{"type": "text"}],
]  # fmt: skip


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as stack:
        yield stack


def mutated(dice: random.Random, good: dict[str, Any]) -> bytes:
    """A body that differs from a good one in some places, as a value or as bytes."""
    body = copy.deepcopy(good)
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        place, value = body, copy.deepcopy(dice.choice(ODDITIES))
        while True:
            key = (
                dice.choice(list(place)) if isinstance(place, dict) else dice.randrange(len(place))
            )
            if isinstance(place[key], (dict, list)) and place[key] and dice.random() < 0.6:
                place = place[key]
                continue
            break
        change = dice.random()
        if change < 0.7:
            place[key] = value
        elif change < 0.85:
            del place[key]
        elif isinstance(place, dict):
            place[dice.choice(["prefix", "name", "tool_calls", "é", "", key + "s"])] = value
        else:
            place.extend([value] * dice.choice([1, 30]))
        if not body:
            break
    text = json.dumps(body, allow_nan=True).encode()
    change = dice.random()
    if change < 0.1:
        at = dice.randrange(len(text))
        text = text[:at] + bytes([dice.randrange(256)]) + text[at + dice.randrange(3) :]
    elif change < 0.13:
        text = text[: dice.randrange(len(text))]
    elif change < 0.15:
        text = text.replace(b": ", b": " + b"[" * dice.choice([3, 2000]), 1)
    return text


def check(answer: httpx.Response, sent: object) -> None:
    if answer.status_code == 200:
        return
    assert answer.status_code in STATUSES, (answer.status_code, sent, answer.text)
    body = answer.json()
    assert ("retry-after" in answer.headers) == (answer.status_code in (429, 503)), sent
    if is_anthropic_path(answer.request.url.path):
        assert body.keys() == {"type", "error", "request_id"}, (sent, body)
        assert body["error"]["type"].endswith("_error") and body["error"]["message"]
        assert answer.status_code not in (422, 424)
        return
    if is_openai_path(answer.request.url.path):
        assert body["error"].keys() == {"code", "message", "type", "param"}, (sent, body)
        assert body["error"]["message"] and body["error"]["code"]
        assert answer.status_code != 422
        return
    assert body["error"].keys() >= {"code", "message", "status"}, (sent, body)
    assert body["status"] == body["error"]["status"] == answer.status_code
    assert body["code"] == body["error"]["code"] == answer.headers["x-ms-error-code"]
    assert body["message"] and body["detail"]


@pytest.mark.slow
def test_mutated_bodies(stack: Stack) -> None:
    """20,000 of them with MIXTRAL_JAX_SOAK=1, and a part of these without."""
    count = 20_000 if SOAK else 1_200
    dice = random.Random(count)
    paths = ["/chat/completions"] * 2 + ["/v1/chat/completions"] * 4 + ["/v1/completions"]
    paths += [MESSAGES] * 3
    seen: dict[int, int] = {}

    async def send(client: httpx.AsyncClient, count: int) -> None:
        for _ in range(count):
            path = dice.choice(paths)
            body = mutated(dice, MESSAGES_BODY if path == MESSAGES else BODY)
            headers = {"extra-parameters": dice.choice(["pass-through", "drop", "error", "x"])}
            answer = await client.post(path, content=body, headers=headers)
            check(answer, body)
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1

    async def run() -> None:
        async with httpx.AsyncClient(base_url=stack.url, headers=HEADERS, timeout=20) as client:
            await asyncio.gather(*(send(client, count // 8) for _ in range(8)))

    asyncio.run(run())
    assert sum(seen.values()) == count
    assert seen[200] > count / 10 and seen[400] > count / 8 and seen[422] > count / 40, seen


@pytest.mark.slow
def test_what_our_own_document_allows_is_answered_as_it_says(stack: Stack) -> None:
    """Requests that schemathesis makes up from /openapi.json, good and bad ones."""
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    schema = schemathesis.openapi.from_url(f"{stack.url}/openapi.json", headers=HEADERS)
    checks = [
        not_a_server_error,
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    ]
    count = 0

    for result in schema.get_all_operations():
        operation = result.ok()

        import hypothesis

        @hypothesis.given(case=operation.as_strategy())
        @hypothesis.settings(
            max_examples=100 if SOAK else 10,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def one(case: Any) -> None:
            answer = case.call(headers=HEADERS, timeout=20)
            case.validate_response(answer, checks=checks, headers=HEADERS)

        one()
        count += 1
    assert count >= 5


def resident(process: psutil.Process) -> int:
    return process.memory_info().rss


def test_a_body_of_100_mb_is_refused_and_not_kept(stack: Stack) -> None:
    """It is sent in chunks, so that no length gives it away."""
    before = resident(psutil.Process())
    sent = 0
    with socket.create_connection(("127.0.0.1", int(stack.url.rpartition(":")[2]))) as link:
        link.settimeout(20)
        link.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n"
            b"content-type: application/json\r\nauthorization: Bearer %s\r\n\r\n" % KEY.encode()
        )
        piece = b"a" * 2**20
        with suppress(OSError):  # it is closed before the end, as it should be
            for _ in range(100):
                link.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
                sent += 1
        answer = b""
        with suppress(ConnectionError):  # what was under way may take the answer with it
            answer = link.recv(4096)
    assert sent < 40
    assert answer == b"" or b" 413 " in answer.splitlines()[0]
    assert resident(psutil.Process()) - before < 64 * 2**20


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 400),
        (json.dumps({"messages": [{"role": "user", "content": "a"}] * 10_000}).encode(), 400),
        (b'{"messages": [{"role": "user", "content": ' + b"9" * 5_000 + b"}]}", 400),
        (b"\xff\xfe{}", 400),
        (b"", 400),
        (b"null", 400),
        (b'{"messages": [], "messages": [{"role": "user", "content": "a"}]}', 200),
    ],
    ids=["deep list", "deep object", "10,000 messages", "long number", "bytes", "empty", "null",
         "key twice"],
)  # fmt: skip
def test_odd_bodies(stack: Stack, body: bytes, status: int) -> None:
    answer = httpx.post(
        f"{stack.url}/v1/chat/completions", content=body, headers=HEADERS, timeout=20
    )
    assert answer.status_code == status, answer.text
    assert len(answer.content) < 3_000
    check(answer, "")


def test_a_slow_reader_holds_its_answer_and_nothing_else(stack: Stack) -> None:
    """Its stream waits for it; memory does not grow, and others are answered meanwhile."""
    words = " ".join(["word" * 200] * 4_000)  # 3 MB of text in 4,000 chunks
    before = resident(psutil.Process())
    port = int(stack.url.rpartition(":")[2])
    body = json.dumps({"messages": [{"role": "user", "content": words}], "stream": True}).encode()
    links = []
    for _ in range(8):
        link = socket.create_connection(("127.0.0.1", port))
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"authorization: Bearer %s\r\ncontent-length: %d\r\n\r\n%s"
            % (KEY.encode(), len(body), body)
        )
        links.append(link)
    for _ in range(20):
        quick = {"messages": [{"role": "user", "content": "one"}]}
        answer = httpx.post(
            f"{stack.url}/v1/chat/completions", json=quick, headers=HEADERS, timeout=20
        )
        assert answer.json()["choices"][0]["message"]["content"] == "one"
    # The bodies themselves, twice (as bytes and as messages), and what the sockets hold.
    assert resident(psutil.Process()) - before < 8 * 3 * len(body) + 64 * 2**20
    for link in links:
        link.close()
