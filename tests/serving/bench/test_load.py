"""The load generator against a real server whose tokens and times are known."""

import asyncio
import json
import math
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from rich.console import Console

from serving.bench import report as bench
from serving.bench.load import (
    Answer,
    BenchError,
    Endpoint,
    Level,
    measure,
    median,
    percentile,
    prompts,
    read,
    summary,
    words_for,
)
from serving.bench.server import free_ports, started

FIRST, EACH = 0.08, 0.03  # seconds to the first token, and between tokens


@dataclass
class Server:
    """Answers with `w ` as often as max_tokens says, a chunk each; fails as it is told to."""

    with_usage: bool = True
    fail: str = ""  # "status", "event", "cut": from the third request on
    seen: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most: int = 0
    endpoint: Endpoint = Endpoint(url="")

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        assert request.headers["authorization"] == "Bearer secret"
        self.seen.append(body)
        if self.fail == "status" and len(self.seen) > 2:
            return JSONResponse({"error": "no more"}, status_code=500)
        return StreamingResponse(self.events(body), media_type="text/event-stream")

    async def events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        self.running += 1
        self.most = max(self.most, self.running)
        fail = self.fail if len(self.seen) > 2 else ""
        yield _event(choices=[{"delta": {"role": "assistant", "content": None}}])
        await asyncio.sleep(FIRST)
        for number in range(body["max_tokens"]):
            yield _event(choices=[{"delta": {"content": "w "}}])
            if number == 1 and fail == "cut":
                return
            if number == 1 and fail == "event":
                yield _event(choices=[], error={"message": "broken"})
            if number + 1 < body["max_tokens"]:
                await asyncio.sleep(EACH)
        yield _event(choices=[{"delta": {}, "finish_reason": "length"}])
        if self.with_usage:
            words = len(body["messages"][0]["content"].split())
            # Three tokens a word, and seven of a template.
            usage = {"prompt_tokens": 3 * words + 7, "completion_tokens": 2 * body["max_tokens"]}
            yield _event(choices=[], usage=usage)
        self.running -= 1
        yield ": a comment\n\ndata: [DONE]\n\n"


def _event(**fields: Any) -> str:
    return f"data: {json.dumps(fields)}\n\n"


@contextmanager
def running(**options: Any) -> Iterator[Server]:
    server = Server(**options)
    app = FastAPI()
    app.add_api_route("/v1/chat/completions", server.chat, methods=["POST"])
    [port] = free_ports(1)
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error")
    http = uvicorn.Server(config)
    thread = threading.Thread(target=http.run)
    thread.start()
    while not http.started:
        assert thread.is_alive()
        time.sleep(0.01)
    server.endpoint = Endpoint(url=f"http://127.0.0.1:{port}/", model="m", key="secret")
    try:
        yield server
    finally:
        http.should_exit = True
        thread.join()


def test_percentiles() -> None:
    assert percentile([30, 10, 20], 50) == 20
    assert percentile([0, 10], 90) == 9
    assert percentile(range(101), 99) == 99
    assert percentile([5], 99) == 5
    assert math.isnan(percentile([], 50))


def test_summary_by_hand() -> None:
    answers = [
        Answer(sent=10, ended=14, arrivals=(11, 12, 14), tokens=3, prompt_tokens=5),
        Answer(sent=10.5, ended=15.5, arrivals=(13.5, 14.5), tokens=7, prompt_tokens=7),
        Answer(sent=11, error="no"),
    ]
    level = summary(2, answers)
    assert (level.requests, level.errors, level.first_error) == (2, 1, "no")
    assert (level.seconds, level.tokens) == (5.5, 10)
    assert (level.prompt_tokens, level.answer_tokens) == (6, 5)
    assert level.tokens_per_second == pytest.approx(10 / 5.5)
    assert level.requests_per_second == pytest.approx(2 / 5.5)
    assert level.ttft["p50"] == 2  # of 1 and 3
    assert level.itl["p50"] == 1  # of 1, 2 and 1
    assert level.itl["p90"] == pytest.approx(1.8)


def test_median_of_repeats() -> None:
    def level(seconds: float, error: str | None = None) -> Level:
        answer = Answer(sent=0, ended=seconds, arrivals=(seconds,), tokens=12)
        return summary(1, [answer, *([Answer(sent=0, error=error)] if error else [])])

    middle = median([level(4), level(1), level(3, "late")])
    assert (middle.tokens_per_second, middle.ttft["p50"]) == (4, 3)
    assert (middle.errors, middle.first_error) == (1, "late")


def test_prompts_differ_but_for_what_they_share() -> None:
    texts = prompts(20, 50)
    assert {len(text.split()) for text in texts} == {50}
    assert len({" ".join(text.split()[:5]) for text in texts}) == 20
    assert texts == prompts(20, 50)
    assert not set(texts) & set(prompts(20, 50, seed=1))
    alike = prompts(4, 50, shared=30) + prompts(4, 50, seed=1, shared=30)
    assert len({" ".join(text.split()[:30]) for text in alike}) == 1
    assert len(set(alike)) == 8


def test_times_counts_and_the_body() -> None:
    done = []
    with running() as server:
        level = measure(
            server.endpoint,
            prompts(6, 10),
            concurrency=3,
            max_tokens=4,
            progress=lambda now, total: done.append((now, total)),
        )
    assert server.most == 3
    assert done == [(number, 6) for number in range(1, 7)]
    assert (level.requests, level.errors, level.concurrency) == (6, 0, 3)
    assert level.tokens == 6 * 8  # by the usage, not by the chunks
    assert level.prompt_tokens == 37
    assert level.tokens_per_second == pytest.approx(48 / level.seconds)
    # Sleeping may take longer, never shorter.
    assert level.seconds >= 2 * (FIRST + 3 * EACH) * 0.95
    assert FIRST * 0.95 <= level.ttft["p50"] < FIRST + 20
    assert EACH * 0.5 <= level.itl["p50"] < EACH + 20
    body = server.seen[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 4, 0)
    assert body["ignore_eos"] is True and body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}


def test_without_usage_chunks_are_counted() -> None:
    with running(with_usage=False) as server:
        level = measure(server.endpoint, prompts(1, 10), concurrency=1, max_tokens=4)
        assert level.tokens == 4
        assert math.isnan(level.prompt_tokens)
        assert words_for(server.endpoint, 100) == 100


def test_prompts_are_as_long_as_the_endpoint_counts() -> None:
    with running() as server:
        words = words_for(server.endpoint, 100)
        assert words == 31  # 3 * 31 + 7 = 100
        assert words_for(server.endpoint, 5) == 1


@pytest.mark.parametrize(
    ("fail", "message"),
    [("status", "status 500"), ("event", "broke off.*broken"), ("cut", r"before \[DONE\]")],
)
def test_failures_are_counted(fail: str, message: str) -> None:
    with running(fail=fail) as server:
        level = measure(server.endpoint, prompts(5, 10), concurrency=1, max_tokens=3)
    assert (level.requests, level.errors) == (2, 3)
    assert level.tokens == 2 * 6
    assert level.first_error and re.search(message, level.first_error)


def test_nobody_there() -> None:
    [port] = free_ports(1)
    endpoint = Endpoint(url=f"http://127.0.0.1:{port}")
    level = measure(endpoint, ["hi"], concurrency=1, max_tokens=1)
    assert (level.requests, level.errors) == (0, 1)
    assert math.isnan(level.tokens_per_second) and math.isnan(level.ttft["p50"])
    with pytest.raises(BenchError, match="ConnectError"):
        words_for(endpoint, 10)


def test_a_stream_with_text_that_comes_late_or_never() -> None:
    lines = [
        ('data: {"choices": [], "usage": null}', 1.0),
        ('data: {"choices": [{"delta": {"content": ""}}]}', 2.0),
        ('data: {"choices": [{"delta": {}}], "usage": {"completion_tokens": 3}}', 4.0),
        ("data: [DONE]", 5.0),
    ]
    answer = read(0.0, lines)
    assert (answer.tokens, answer.arrivals, answer.ended) == (3, (), 4.0)
    assert read(0.0, lines[:1] + lines[3:]).error == "the answer had no token"
    assert "not JSON" in str(read(0.0, [("data: {", 1.0)]).error)


@pytest.mark.slow
def test_report(tmp_path: Path) -> None:
    good = summary(8, [Answer(sent=0, ended=2, arrivals=(1, 2), tokens=4, prompt_tokens=100)])
    bad = summary(32, [Answer(sent=0, error="status 500")])
    console = Console(width=80, record=True)
    console.print(bench.table([good, bad]))
    text = console.export_text()
    assert "100 / 4" in text and "2.00" in text and "…" not in text
    assert "32 clients: 1 failed" in text and "status 500" in text
    bench.write_json(tmp_path / "a.json", {"facts": bench.facts(), "levels": [good, bad]})
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["levels"][0]["tokens_per_second"] == 2
    assert report["levels"][1]["ttft"]["p50"] is None  # JSON has no NaN
    assert report["facts"]["cores"] >= 1
    bench.plot(tmp_path / "a.png", [good, bad], "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BenchError, match=r"pip install 'mixtral-jax\[bench\]'"):
        bench.plot(tmp_path / "a.png", [], "title")


def test_a_server_that_does_not_start() -> None:
    command = [sys.executable, "-c", "print('no such weights')"]
    with (
        pytest.raises(BenchError, match="no such weights"),
        started(command, "http://127.0.0.1:9/"),
    ):
        raise AssertionError
