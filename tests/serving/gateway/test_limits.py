"""Limits of callers over real sockets: what is refused is refused before it costs anything."""

import concurrent.futures
import contextlib
import dataclasses
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import pytest

from serving.access.caller import Caller, CallerLimits
from serving.access.credentials import Access
from serving.access.keyring import Keyring
from serving.accounting.accounts import Accounts
from serving.accounting.ledger import UsageLedger
from serving.accounting.rate_limits import RateLimits
from tests.support.fakes import KEY, PATIENCE, Stack, running_stack
from tests.support.gateway import BEARER, address, chat_body, check_error, events

CHAT = "/v1/chat/completions"


@contextlib.contextmanager
def limited(**settings: Any) -> Iterator[tuple[Stack, httpx.Client]]:
    with (
        running_stack(**settings) as stack,
        httpx.Client(
            base_url=stack.url, headers=BEARER, timeout=PATIENCE, trust_env=False
        ) as client,
    ):
        yield stack, client


def used(client: httpx.Client) -> tuple[int, int, int]:
    """The caller's requests, prompt tokens and completion tokens."""
    rows = client.get("/usage").json()["data"]
    names = ("requests", "prompt_tokens", "completion_tokens")
    requests, prompt, completion = (sum(row[name] for row in rows) for name in names)
    return requests, prompt, completion


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_thirty_two_at_once_get_a_minutes_tokens_and_no_more() -> None:
    with limited(max_tokens_per_minute=50) as (stack, client):
        body = chat_body("one two three four", max_tokens=4)

        def ask(_: int) -> httpx.Response:
            return client.post(CHAT, json=body)

        started = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(ask, range(32)))
        refilled = 50 / 60 * (time.monotonic() - started)
        whole = [answer for answer in answers if answer.status_code == 200]
        assert {answer.status_code for answer in answers} == {200, 429}
        spent = sum(answer.json()["usage"]["total_tokens"] for answer in whole)
        # Each is 1 + 4 tokens, and reserves 4 more for the estimate of its prompt.
        assert len(whole) >= 4 and spent == 5 * len(whole) <= 50 + refilled
        assert len(stack.service.requests) == len(whole)
        assert used(client) == (len(whole), len(whole), 4 * len(whole))


def test_a_request_beyond_the_limit_is_refused_before_its_body_is_read() -> None:
    with limited(max_requests_per_minute=1) as (stack, client):
        assert client.post(CHAT, json=chat_body("one")).status_code == 200
        refused = client.post(CHAT, content=b"{", headers={"content-type": "application/json"})
        assert "1 requests a minute" in check_error(refused, 429, "TooManyRequests")
        assert (
            client.post(CHAT, json=chat_body("one"), headers={"authorization": ""}).status_code
            == 401
        )
        # The body of this one never comes.
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 4000000\r\n\r\n"
        with socket.create_connection(address(stack), PATIENCE) as connection:
            connection.sendall(head.encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 429 ")
        assert len(stack.service.requests) == 1


def test_answers_and_refusals_tell_the_limits() -> None:
    limits = CallerLimits(requests_per_minute=60, tokens_per_minute=300)
    # Time stands still, because nothing may come back between two answers.
    accounts = Accounts(RateLimits(limits, clock=lambda: 1000.0), UsageLedger())
    with limited(parts={"accounts": accounts}) as (_, client):
        first = client.post(CHAT, json=chat_body("one", max_tokens=10))
        assert first.headers["x-ratelimit-limit-requests"] == "60"
        assert first.headers["x-ratelimit-remaining-requests"] == "59"
        assert first.headers["x-ratelimit-reset-requests"] == "1s"
        assert first.headers["x-ratelimit-limit-tokens"] == "300"
        assert first.headers["x-ratelimit-remaining-tokens"] == "298"  # one of the prompt, one said
        streamed = client.post(CHAT, json=chat_body("one", max_tokens=100, stream=True))
        # Told when the answer begins: all that it may become is reserved, which is the context of
        # 64 less 5, by which the estimate of the prompt was too high.
        assert streamed.headers["x-ratelimit-remaining-tokens"] == "239"
        malformed = client.post(CHAT, json={"messages": 3})
        assert malformed.status_code == 400
        assert malformed.headers["x-ratelimit-remaining-requests"] == "57"
        too_much = client.post(CHAT, json=chat_body("one", max_tokens=60, n=6))
        assert "300 tokens a minute" in check_error(too_much, 400, "BadRequest")
        long = chat_body("w " * 50, max_tokens=50, n=4)
        assert client.post(CHAT, json=long).status_code == 200  # 201 tokens
        refused = client.post(CHAT, json=long)
        check_error(refused, 429, "TooManyRequests")
        assert (
            0 < int(refused.headers["retry-after-ms"]) <= 1000 * int(refused.headers["retry-after"])
        )
    with limited() as (_, client):
        headers = client.post(CHAT, json=chat_body("one")).headers
        assert not [name for name in headers if name.startswith("x-ratelimit")]


def test_requests_at_a_time() -> None:
    with limited(max_concurrent_requests=2) as (stack, client):
        body = chat_body("one !wait two", stream=True)
        with client.stream("POST", CHAT, json=body), client.stream("POST", CHAT, json=body):
            refused = client.post(CHAT, json=chat_body("one"))
            assert "2 requests at a time" in check_error(refused, 429, "TooManyRequests")
            prompts = client.post("/v1/completions", json={"prompt": ["a", "b", "c"]})
            assert prompts.status_code == 429
        until(lambda: client.post(CHAT, json=chat_body("one")).status_code == 200)
        # Whatever a request ends with, its place is free again.
        for wrong in ("!fail:Overloaded", "!vanish", "!fail:EngineFailure", "!fail:InvalidRequest"):
            assert client.post(CHAT, json=chat_body(wrong)).status_code != 200
        assert client.post(CHAT, json={"messages": []}).status_code == 400
        three = client.post("/v1/completions", json={"prompt": ["a", "b", "c"]})
        assert "3 prompts" in check_error(three, 400, "BadRequest")
        assert client.post("/v1/completions", json={"prompt": ["a", "b"]}).status_code == 200
        stack.service.release()


def test_prompts_of_a_text_completion_are_requests() -> None:
    with limited(max_requests_per_minute=16) as (_, client):
        asked = {"prompt": ["one"] * 16, "max_tokens": 1}
        assert client.post("/v1/completions", json=asked).status_code == 200
        assert client.post("/v1/completions", json=asked).status_code == 429
        assert used(client) == (1, 16, 16)


def test_more_prompts_than_a_key_may_have_at_a_time_wait_for_each_other() -> None:
    with limited(max_concurrent_requests=20) as (stack, client):
        asked = {"prompt": ["one"] * 50, "max_tokens": 1}
        assert client.post("/v1/completions", json=asked).status_code == 200
        body = {"prompt": ["!open !wait one"] * 50, "max_tokens": 1, "stream": True}
        stack.service.reset()
        with client.stream("POST", "/v1/completions", json=body):
            until(lambda: len(stack.service.requests) == 20)
            refused = client.post(CHAT, json=chat_body("one"))
            assert "20 requests at a time" in check_error(refused, 429, "TooManyRequests")
            stack.service.release()
        until(lambda: client.post(CHAT, json=chat_body("one")).status_code == 200)


def test_several_gateways_have_a_share_each() -> None:
    with limited(max_requests_per_minute=6, limit_share="1/3") as (_, client):
        answers = [client.post(CHAT, json=chat_body("one")) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[0].headers["x-ratelimit-limit-requests"] == "2"


def test_a_key_has_limits_of_its_own() -> None:
    class Generous(Access):
        """Knows keys that say more than the flags."""

        async def admit(self, headers: Mapping[str, str]) -> Caller:
            limits = CallerLimits(requests_per_minute=2)
            return dataclasses.replace(await super().admit(headers), limits=limits)

    access = Generous(Keyring({"default": KEY}))
    with limited(access=access, max_requests_per_minute=1) as (_, client):
        answers = [client.post(CHAT, json=chat_body("one")) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]


def drop(stack: Stack, client: httpx.Client, script: str) -> None:
    """Leaves a stream when the service has done the script, before its last word."""
    stack.service.reset()
    body = chat_body(f"{script} !wait last", stream=True)
    with client.stream("POST", CHAT, json=body) as response:
        assert response.status_code == 200
        heartbeats = 0
        for event in events(response.iter_lines()):
            heartbeats += not event["choices"]
            if heartbeats == 3:  # nothing more comes
                break
    assert stack.service.cancelled.wait(PATIENCE)


def test_who_drops_before_the_first_token_pays_what_was_computed() -> None:
    with limited(heartbeat_seconds=0.1) as (stack, client):
        drop(stack, client, "!open")  # it waited in the queue
        drop(stack, client, "!open !compute")
        until(lambda: used(client) == (1, 1, 0))
        drop(stack, client, "!open !compute one")
        until(lambda: used(client) == (2, 2, 1))


@pytest.mark.parametrize("is_stream", [False, True])
def test_who_gets_nothing_because_of_us_pays_nothing(is_stream: bool) -> None:
    with limited() as (_, client):
        for error, status in (("EngineFailure", 424), ("Unavailable", 503)):
            body = chat_body(f"!fail:{error}", stream=is_stream)
            assert client.post(CHAT, json=body).status_code == status
        assert used(client) == (0, 0, 0)
        whole = client.post(CHAT, json=chat_body("one two !fail:EngineFailure"))
        assert whole.status_code == 424
        assert used(client) == (0, 0, 0)
        with pytest.raises(httpx.RemoteProtocolError):
            client.post(CHAT, json=chat_body("one two !fail:EngineFailure", stream=True))
        assert used(client) == (1, 1, 2)  # what the stream has said


def test_cached_tokens_are_told_on_openais_paths_and_written_down() -> None:
    with limited(usage_details=True) as (stack, client):
        stack.service.cached_tokens = 1
        for is_stream in (False, True):
            body = chat_body("one", stream=is_stream)
            text = client.post(CHAT, json=body).text
            assert '"prompt_tokens_details":{"cached_tokens":1}' in text
            assert "cached_tokens" not in client.post("/chat/completions", json=body).text
        asked = {"prompt": ["one", "two"]}
        answer = client.post("/v1/completions", json=asked).json()
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
        (row,) = client.get("/usage").json()["data"]
        assert (row["prompt_tokens"], row["cached_tokens"]) == (6, 6)


def test_guesses_are_told_with_the_details_of_a_usage() -> None:
    with limited(usage_details=True) as (stack, client):
        stack.service.guesses = 3, 2
        asked = {"prompt": ["one", "two"]}
        details = client.post("/v1/completions", json=asked).json()["usage"][
            "completion_tokens_details"
        ]
        assert details == {"accepted_prediction_tokens": 6, "rejected_prediction_tokens": 4}
        assert "prediction" not in client.post("/chat/completions", json=chat_body("one")).text
    with limited() as (stack, client):
        stack.service.guesses = 3, 2
        assert "prediction" not in client.post(CHAT, json=chat_body("one")).text


def test_a_usage_has_numbers_alone_unless_details_are_asked_for() -> None:
    """langchain-mistralai adds up all the values of a usage."""
    with limited() as (stack, client):
        stack.service.cached_tokens = 1
        for path, body in ((CHAT, chat_body("one")), ("/v1/completions", {"prompt": "one"})):
            usage = client.post(path, json=body).json()["usage"]
            assert usage == {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        answer = client.post("/v1/responses", json={"input": "one"}).json()
        assert answer["usage"]["input_tokens_details"]["cached_tokens"] == 1


def test_the_ledger_has_what_the_client_of_a_broken_joined_answer_has_read() -> None:
    with limited() as (stack, client):
        # When the second has failed, much of the first is on its way.
        prompts = ["one two !wait " + "three " * 50, "a b !wait !fail:EngineFailure", "c !wait"]
        asked = {"prompt": prompts, "max_tokens": 60, "stream": True}
        read = 0
        with (
            pytest.raises(httpx.RemoteProtocolError),
            client.stream("POST", "/v1/completions", json=asked) as response,
        ):
            for event in events(response.iter_lines()):
                read += sum(bool(choice["text"]) for choice in event["choices"])
                if read == 5:
                    stack.service.release()
        assert used(client)[2] == read >= 5
