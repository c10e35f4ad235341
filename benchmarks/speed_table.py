"""Measures everything of the table of speeds in docs/numbers.md and writes the table: make bench

    python -m benchmarks.speed_table [--peers-json FILE] [--engine-json FILE] [--http-json FILE]

Runs `benchmarks.engine`, the bare engine against the same load over HTTP, and `benchmarks.peers`
(whose environments must exist: `python -m benchmarks.peers --install`), one after the other, for
about an hour; a file that is given is read instead of measured. The targets are defined here.
"""

import json
import re
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
import typer

from benchmarks.command import run
from serving.bench.load import Endpoint, Level, body, prompts, words_for
from serving.bench.offline import OfflineEngine
from serving.bench.report import facts, load_of, write_json
from serving.bench.server import free_ports, served, stop

NUMBERS = Path(__file__).parent.parent / "docs" / "numbers.md"
BEGIN, END = "<!-- speeds: make bench -->", "<!-- end of speeds -->"
INT8 = Path("checkpoints/smollm2-135m-instruct-int8")

# (peer, load): how many times as fast as the peer ours must be at least.
TARGETS = {
    ("transformers", "1 client"): 3.5,
    ("transformers", "8 clients"): 3.0,
    ("transformers", "512 prompt"): 1.5,
    ("vllm", "1 client"): 2.0,
    ("vllm", "8 clients"): 1.7,
    ("vllm", "32 clients"): 1.4,
    ("vllm", "512 prompt"): 1.2,
    ("llama.cpp", "1 client"): 1.1,
    ("llama.cpp", "8 clients"): 2.5,
    ("llama.cpp", "32 clients"): 3.0,
}


def http(repeats: int) -> dict[str, float]:
    """The bare engine against HTTP, gateway, gRPC and service, in turn; tokens/s and ms."""
    sizes = {"prompt_tokens": 100, "answer_tokens": 64}
    bare, whole = list[Level](), list[Level]()
    # Over HTTP all prompts begin with the template's system text, one page of which is reused.
    engine = OfflineEngine.of_checkpoint(
        str(INT8), None, concurrency=32, max_step_tokens=128, shared_prefix=16, **sizes
    )
    (port,) = free_ports(1)
    with served(str(INT8), {"max-sequences": 32, "metrics-port": port}) as endpoint:
        measure = load_of(endpoint, **sizes, shared_prefix=0)
        added = _first_token_added(endpoint, port, 4 * repeats)
        for turn in range(repeats):
            bare.append(engine.measure(64, 32, seed=turn))
            whole.append(measure(64, 32, turn, _unseen))
    speeds = [[level.tokens_per_second for level in levels] for levels in (bare, whole)]
    return {
        "bare_tokens_per_second": statistics.median(speeds[0]),
        "http_tokens_per_second": statistics.median(speeds[1]),
        "http_over_bare": statistics.median(w / b for b, w in zip(*speeds, strict=True)),
        "ttft_added_ms": 1e3 * statistics.median(added),
    }


def _first_token_added(endpoint: Endpoint, metrics_port: int, requests: int) -> list[float]:
    """Returns the seconds to each first token that were spent outside the engine's thread.

    One client on one connection; the request that opens it is not counted. It is a bare socket,
    because the HTTP client of `ask` itself takes 2 to 3 ms before it sends and after it receives.
    """

    def inside() -> float:
        text = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics", trust_env=False).text
        match = re.search(r"^vllm:time_to_first_token_seconds_sum\S* (.+)$", text, re.MULTILINE)
        assert match is not None
        return float(match[1])

    added: list[float] = []
    address = urlsplit(endpoint.url)
    with socket.create_connection((address.hostname or "", address.port or 80)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for text in prompts(requests + 1, words_for(endpoint, 100), seed=1000, shared=0):
            before = inside()  # while no request is under way
            seconds = _first_token(connection, endpoint, body(endpoint, text, 64))
            added.append(seconds - (inside() - before))
    return added[1:]


def _first_token(connection: socket.socket, endpoint: Endpoint, asked: dict[str, Any]) -> float:
    """Returns the seconds to the first text of an answer, which is read to its end."""
    content = json.dumps(asked).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {urlsplit(endpoint.url).netloc}\r\n"
        f"authorization: Bearer {endpoint.key}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    began, first = time.perf_counter(), None
    connection.sendall(head.encode() + content)
    answer = b""
    while not answer.endswith(b"\r\n0\r\n\r\n"):
        answer += connection.recv(2**16)
        if first is None and re.search(rb'"content": ?"[^"]', answer):
            first = time.perf_counter()
    assert first is not None and answer.startswith(b"HTTP/1.1 200"), answer[:500]
    return first - began


def _unseen(done: int, total: int) -> None:
    """No progress bar."""


def table(
    machine: dict[str, Any],
    engine: dict[str, Any],
    over: dict[str, float],
    results: list[dict[str, Any]],
) -> str:
    """The markdown between the marks."""
    lines = [
        BEGIN,
        f"{machine['cores']} cores of {machine['cpu']} with "
        f"{', '.join(machine['instruction_sets'])}; jax {machine['jax']}. SmolLM2-135M-Instruct"
        " over HTTP, prompts of about 100 tokens, answers of 64, ours in int8 and the peer in its"
        " best type in turn, median of the ratios. `make bench` writes this table.",
        "",
        "| load | against | ours, tokens/s | theirs | ratio | target |",
        "|---|---|---|---|---|---|",
    ]
    for name, target in TARGETS.items():
        rows = [r for r in results if _key(r) == name]
        if not rows:
            lines.append(f"| {name[1]} | {name[0]} | | | not measured | ≥ {target:g} |")
        else:
            best = max(rows, key=lambda row: statistics.median(_speeds(row, "theirs")))
            mine, other = (statistics.median(_speeds(best, who)) for who in ("ours", "theirs"))
            lines.append(
                f"| {name[1]} | {best['contender']} | {mine:.0f} | {other:.0f} "
                f"| {_verdict(best['ratio'], at_least=target)} | ≥ {target:g} |"
            )
    context, prefix, experts = engine["context"], engine["prefix"], engine["experts"]
    extra, second = context["extra_over_reading"], prefix["second_over_first"]
    share, added, cost = over["http_over_bare"], over["ttft_added_ms"], experts["time_over_bytes"]
    lines += [
        "",
        "| what | figure | target |",
        "|---|---|---|",
        f"| 32 clients over HTTP and gRPC, against the bare engine "
        f"| {_verdict(share, at_least=0.95)} | ≥ 0.95 |",
        f"| first token at the client, less the time from arrival to it at the engine's thread "
        f"| {_verdict(added, at_most=3)} ms | ≤ 3 ms |",
        f"| 8 sequences from context 128 to 2,048 ({context['step_at_128_ms']} to "
        f"{context['step_at_2048_ms']} ms a step), against reading the extra keys and values at "
        f"{context['bandwidth_gb_s']} GB/s | {_verdict(extra, at_most=1.5)} | ≤ 1.5 |",
        f"| first token after a prefix of 1,500 tokens that was seen before, against the first time"
        f" | {_verdict(second, at_most=0.25)} | ≤ 0.25 |",
        f"| 8 experts against the dense model, 8 sequences, a step: ratio of times over ratio of "
        f"weight bytes touched | {_verdict(cost, at_most=1.25)} | ≤ 1.25 |",
        END,
    ]
    return "\n".join(lines)


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["contender"].split()[0], row["point"]["name"]


def _speeds(row: dict[str, Any], who: str) -> list[float]:
    if row["point"]["answer_tokens"] == 1:
        return [level["prompt_tokens"] / level["ttft"]["p50"] for level in row[who]]
    return [level["tokens_per_second"] for level in row[who]]


def _verdict(value: float, *, at_least: float = 0.0, at_most: float = float("inf")) -> str:
    """Writes a figure, and says so if it misses its target."""
    met = at_least <= value <= at_most
    return f"**{value:.2f}**" if met else f"{value:.2f} (missed)"


def main(
    peers_json: Annotated[
        list[Path] | None, typer.Option(help="Of benchmarks.peers; may be given for each peer.")
    ] = None,
    engine_json: Annotated[Path | None, typer.Option(help="Of benchmarks.engine.")] = None,
    http_json: Annotated[Path | None, typer.Option(help="Of an earlier run of this.")] = None,
    repeats: Annotated[int, typer.Option(help="How often each is measured.")] = 5,
) -> None:
    """Measure everything of the table of speeds, and write the table."""
    folder = Path("build/bench")
    folder.mkdir(parents=True, exist_ok=True)
    if not INT8.exists():
        raise SystemExit(
            f"{INT8} is missing; make it with "
            f"`mixtral-jax convert smollm2-135m-instruct {INT8} --dtype int8`"
        )
    if engine_json is None:
        engine_json = folder / "engine.json"
        _run("benchmarks.engine", f"--json={engine_json}", f"--repeats={repeats}")
    if http_json is None:
        http_json = folder / "http.json"
        write_json(http_json, {"facts": facts(), **http(repeats)})
    if not peers_json:
        peers_json = [folder / "peers.json"]
        _run("benchmarks.peers", f"--our={INT8}", f"--json={peers_json[0]}", f"--repeats={repeats}")
    engine, over, *peers = (
        json.loads(path.read_text()) for path in (engine_json, http_json, *peers_json)
    )
    results = [row for report in peers for row in report["results"]]
    text = NUMBERS.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    written = table(peers[0]["facts"], engine, over, results)
    NUMBERS.write_text(before + written + rest.split(END)[1], encoding="utf-8")


def _run(module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command)
    try:
        status = process.wait()
    finally:
        if process.poll() is None:
            stop(process)
    if status:
        raise SystemExit(f"{module} ended with status {status}; see above")


if __name__ == "__main__":
    run(main, "benchmarks.speed_table")
