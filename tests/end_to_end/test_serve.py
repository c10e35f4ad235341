"""`mixtral-jax serve` with the toy model: processes, signals, the pasted curl line, the client."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from azure.ai.inference import ChatCompletionsClient
from azure.ai.inference.models import SystemMessage, UserMessage
from azure.core.credentials import AzureKeyCredential
from azure.core.exceptions import ClientAuthenticationError

from serving.client import Client
from serving.client.types import Message, completion_of
from tests.support.servers import COMMAND, ROOT, Server, environment, free_ports, running


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(command()) as server:
        yield server


def command() -> list[str]:
    http, grpc = free_ports(2)
    ports = ["--port", str(http), "--grpc-port", str(grpc)]
    # Two buckets: compiling is most of the start.
    sizes = ["--max-sequences=1", "--max-step-tokens=8"]
    return [COMMAND, "serve", "--model=tiny-random", *ports, *sizes]


def client(server: Server, key: str) -> ChatCompletionsClient:
    return ChatCompletionsClient(endpoint=server.url, credential=AzureKeyCredential(key))


def test_a_given_key_is_never_printed(server: Server) -> None:
    assert server.banner.count("MIXTRAL_JAX_API_KEY") == 2  # where the key is, and in the curl line
    assert server.key not in server.banner


@pytest.mark.slow
def test_a_made_up_key_is_printed_to_a_terminal_and_else_written_to_a_file(tmp_path: Path) -> None:
    state = {"XDG_STATE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    shown = {}
    for kind, (reading, writing) in {"terminal": pty.openpty(), "pipe": os.pipe()}.items():
        arguments = command()
        with subprocess.Popen(
            arguments, stdout=writing, stderr=subprocess.DEVNULL, env=environment(**state)
        ) as process:
            os.close(writing)
            text = ""
            while "curl -sN" not in text:
                text += os.read(reading, 4096).decode().replace("\r\n", "\n")
            curl = text[text.index("curl -sN") :].splitlines()[0]
            out = subprocess.run(curl, shell=True, capture_output=True, text=True, timeout=60)
            assert out.stdout.endswith("data: [DONE]\n\n")
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        os.close(reading)
        shown[kind] = re.search(r"^key   (.*)$", text, re.MULTILINE)[1]  # type: ignore[index]
    assert re.fullmatch("[0-9a-f]{32}", shown["terminal"])
    file = Path(shown["pipe"].removeprefix("in "))
    assert file.parent == tmp_path / "mixtral-jax"
    assert [path for path in file.parent.iterdir() if path.name.startswith("key-")] == [file]
    assert file.stat().st_mode & 0o777 == 0o600
    assert re.fullmatch("[0-9a-f]{32}\n", file.read_text(encoding="utf-8"))


def test_the_printed_curl_line_streams(server: Server) -> None:
    own = environment(MIXTRAL_JAX_API_KEY=server.key)
    out = subprocess.run(
        server.curl, shell=True, env=own, capture_output=True, text=True, timeout=60
    )
    assert out.returncode == 0
    events = out.stdout.split("\n\n")
    assert all(event.startswith("data: ") for event in events[:-1])
    assert events[-2:] == ["data: [DONE]", ""]
    first = json.loads(events[0].removeprefix("data: "))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_the_azure_client(server: Server) -> None:
    azure = client(server, server.key)
    info = azure.get_model_info()
    assert (info.model_name, info.model_type) == ("tiny-random", "chat-completions")
    messages = [SystemMessage("Be brief."), UserMessage("How many languages are there?")]
    response = azure.complete(messages=messages, max_tokens=9, seed=5)
    usage = response.usage
    assert usage.prompt_tokens + usage.completion_tokens == usage.total_tokens
    assert 1 <= usage.completion_tokens <= 9
    updates = list(azure.complete(messages=messages, max_tokens=9, seed=5, stream=True))
    text = "".join(update.choices[0].delta.content or "" for update in updates)
    assert text == response.choices[0].message.content
    with pytest.raises(ClientAuthenticationError) as caught:
        client(server, "wrong").complete(messages=messages)
    assert caught.value.status_code == 401
    assert caught.value.error is not None and caught.value.error.code


def test_a_taken_port_is_one_clear_line(server: Server) -> None:
    port = server.url.rpartition(":")[2]
    out = subprocess.run(
        [COMMAND, "serve", "--model=tiny-random", "--port", port],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert out.returncode == 1
    assert out.stderr.strip().splitlines() == [
        f"mixtral-jax: cannot listen on 127.0.0.1:{port} (Address already in use); "
        "stop what runs there or choose another with --port"
    ]


def test_a_model_that_is_not_there_is_one_clear_line() -> None:
    arguments = command()
    arguments[2] = "--model=nowhere"
    out = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=240)
    assert out.returncode == 1
    assert "mixtral-jax: nowhere is not a mixtral-jax checkpoint" in out.stderr
    assert "Traceback" not in out.stderr


def test_a_taken_port_for_metrics_is_one_clear_line(server: Server) -> None:
    port = server.url.rpartition(":")[2]
    out = subprocess.run(
        [*command(), "--metrics-port", port],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert out.returncode == 1
    assert (
        f"mixtral-jax: cannot listen on 127.0.0.1:{port} (Address already in use); "
        "stop what runs there or choose another with --metrics-port and --metrics-host"
    ) in out.stderr.splitlines()
    assert "Traceback" not in out.stderr


def test_metrics_and_every_parameter_and_nothing_compiles() -> None:
    (port,) = free_ports(1)
    flags = ["--metrics-port", str(port), "--max-sequences=2", "--no-prefix-reuse"]
    with running([*command(), *flags, "--deterministic"]) as server:
        azure = client(server, server.key)
        asked: dict[str, Any] = {"messages": [UserMessage("x" * 60)], "temperature": 1}
        for extras in (
            {},
            {"n": 3, "logprobs": True, "top_logprobs": 5},
            {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "logit_bias": {"70": 5}},
            {"stop_token_ids": [70], "min_tokens": 2},
        ):
            extras = {"ignore_eos": True, **extras}
            answer = azure.complete(
                **asked,
                max_tokens=9,
                seed=2,
                presence_penalty=0.1,
                frequency_penalty=0.8,
                model_extras=extras,
            )
            assert len(answer.choices) == extras.get("n", 1)
            if "stop_token_ids" not in extras:
                assert answer.usage.completion_tokens == 9 * len(answer.choices)
            if extras.get("logprobs"):
                for choice in answer.choices:
                    (*_, last) = choice["logprobs"]["content"]
                    assert len(last["top_logprobs"]) == 5
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False, timeout=60).text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#"]
        figures = {name.partition("{")[0]: value for name, value in lines}
    assert float(figures["mixtral_compilations_total"]) == 0
    assert float(figures["vllm:generation_tokens_total"]) > 9 * 5
    assert float(figures["vllm:prefix_cache_hits_total"]) == 0


def children(server: Server) -> dict[str, psutil.Process]:
    names = {"serving": "service", "serving.gateway": "gateway"}
    return {names[p.cmdline()[2]]: p for p in psutil.Process(server.process.pid).children()}


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.soak) for n in (signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_a_signal_ends_everything_with_status_0(number: signal.Signals) -> None:
    with running(command()) as server:
        both = children(server)
        assert set(both) == {"service", "gateway"}
        assert server.stop(number) == 0
        assert not any(process.is_running() for process in both.values())


def ask(server: Server, **parameters: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **parameters}
    headers = {"api-key": server.key}
    url = f"{server.url}/v1/chat/completions"
    return httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False)


def test_a_service_that_was_killed_comes_back_and_503_stands_in_for_it() -> None:
    with running(command()) as server:
        gateway = children(server)["gateway"]
        with httpx.stream(
            "POST",
            f"{server.url}/v1/chat/completions",
            json={
                "messages": [{"role": "user", "content": "x"}],
                "stream": True,
                "ignore_eos": True,
                # Choice after choice on the only row: under way still, however late the kill.
                "n": 16,
                "max_tokens": 400,
            },
            headers={"api-key": server.key},
            timeout=60,
            trust_env=False,
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            children(server)["service"].kill()
            killed = time.monotonic()
            with pytest.raises(httpx.TransportError):
                list(lines)
            assert time.monotonic() - killed < 9  # pings, which tell it too, begin after 10 s
        statuses = set()
        while (late := ask(server)).status_code != 200:
            statuses.add(late.status_code)
            assert late.headers["retry-after"]
            assert time.monotonic() - killed < 240
            time.sleep(0.1)
        assert statuses == {503}
        assert children(server)["gateway"].pid == gateway.pid
        assert server.stop() == 0


def test_a_gateway_that_was_killed_comes_back() -> None:
    with running(command()) as server:
        service = children(server)["service"]
        children(server)["gateway"].kill()
        deadline = time.monotonic() + 240
        while True:
            assert time.monotonic() < deadline
            with suppress(httpx.TransportError):
                if ask(server).status_code == 200:
                    break
            time.sleep(0.1)
        assert children(server)["service"].pid == service.pid
        assert server.stop() == 0


def test_drain_ends_everything_with_status_0_after_the_answers() -> None:
    with running(command()) as server, Client(server.target, key=server.key) as grpc_client:
        assert grpc_client.info().name == "tiny-random"
        chat: list[Message] = [{"role": "user", "content": "x"}]
        # One choice after another on the only row: under way still, however late drain is called.
        answer = grpc_client.chat(chat, n=16, max_tokens=400, ignore_eos=True)
        seen = [next(answer)]
        assert grpc_client.drain() == 1
        late = ask(server)
        assert (late.status_code, late.headers["retry-after"].isdecimal()) == (503, True)
        seen += answer
        assert completion_of(seen).usage.completion_tokens == 16 * 400
        assert server.process.wait(60) == 0


def test_a_killed_supervisor_leaves_nothing_behind() -> None:
    with running(command()) as server:
        both = children(server)
        os.kill(server.process.pid, signal.SIGKILL)
        psutil.wait_procs(list(both.values()), timeout=30)
        assert not any(process.is_running() for process in both.values())


def test_a_dropped_client_frees_the_only_row(server: Server) -> None:
    """With one row, the second request would wait for 400 tokens of the first one."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    body = json.dumps(
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 400, "stream": True}
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST /chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        assert b"200 OK" in connection.recv(4096)
    started = time.monotonic()
    client(server, server.key).complete(messages=[UserMessage("y")], max_tokens=1)
    assert time.monotonic() - started < 30
