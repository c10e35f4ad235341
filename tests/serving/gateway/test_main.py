"""The command `python -m serving.gateway`."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from serving.flags import KEY_VARIABLE, SERVICE_KEY_VARIABLE
from serving.gateway.__main__ import main
from tests.support.fakes import KEY, PATIENCE, Stack
from tests.support.gateway import BEARER, chat_body


def test_the_command_serves_logs_a_line_and_ends_in_peace(stack: Stack) -> None:
    command = [sys.executable, "-m", "serving.gateway", "--port", "0", "--target", stack.target]
    environment = os.environ | {KEY_VARIABLE: KEY, SERVICE_KEY_VARIABLE: KEY}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            url = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline())
            assert url is not None
            with httpx.Client(base_url=url[0], headers=BEARER, timeout=PATIENCE) as client:
                assert client.get("/health/ready").status_code == 200
                asking = {"connection": "upgrade", "upgrade": "websocket"}
                assert client.get("/health/live", headers=asking).status_code == 200
                for _ in range(2):
                    with pytest.raises(httpx.RemoteProtocolError):
                        client.post(
                            "/chat/completions",
                            json=chat_body("one !fail:EngineFailure", stream=True),
                        )
            process.send_signal(signal.SIGTERM)
            log = process.stderr.read()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    lines = log.splitlines()
    assert len(lines) == 2, log
    told = 'outcome=broken error=ModelError reason="EngineFailure was asked for"'
    assert all(told in line for line in lines)


@pytest.mark.parametrize(("hard", "is_limited"), [(256, True), (4096, False)])
def test_idle_sockets_keep_nobody_out_where_files_are_few(
    stack: Stack, hard: int, is_limited: bool
) -> None:
    """A process that may open 256 files answers in spite of 300 idle connections."""
    # A program of its own sets the limit, because a process with threads must not fork.
    limited = (
        "import os, resource, sys; "
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard})); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-m", "serving.gateway", "--port", "0", "--target", stack.target]
    environment = os.environ | {KEY_VARIABLE: KEY, SERVICE_KEY_VARIABLE: KEY}
    with (
        subprocess.Popen(
            [sys.executable, "-c", limited, *command],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
        contextlib.ExitStack() as idle,
    ):
        try:
            assert process.stderr is not None
            url = re.search(r"http://(127\.0\.0\.1):(\d+)", process.stderr.readline())
            assert url is not None
            for _ in range(300):
                idle.enter_context(socket.create_connection((url[1], int(url[2])), PATIENCE))
            with httpx.Client(base_url=url[0], headers=BEARER, timeout=PATIENCE) as client:
                assert client.post("/chat/completions", json=chat_body("one")).status_code == 200
            process.send_signal(signal.SIGTERM)
            log = process.stderr.read()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    assert ("at most 192 connections instead of 4096" in log) == is_limited


def test_what_is_wrong_before_the_start_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert main(["--port", "0"]) == 1
    assert KEY_VARIABLE in capsys.readouterr().err
    monkeypatch.setenv(KEY_VARIABLE, "two words")
    assert main(["--port", "0"]) == 1
    assert KEY_VARIABLE in capsys.readouterr().err
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.delenv(SERVICE_KEY_VARIABLE, raising=False)
    assert main(["--port", "0"]) == 1
    assert SERVICE_KEY_VARIABLE in capsys.readouterr().err
    monkeypatch.setenv(SERVICE_KEY_VARIABLE, KEY)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        assert main(["--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(rf"mixtral-jax: port {port} of 127\.0\.0\.1 is in use; .*--port\n", said)
    assert main(["--port", "99999"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"mixtral-jax: .*'--port'.*65535 .* --help\)\n", said), said
