"""Several gateway processes before a scripted service, with real kills and signals."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import httpx
import psutil
import pytest

from serving.flags import KEY_VARIABLE, SERVICE_KEY_VARIABLE
from tests.support.fakes import KEY, Stack, running_stack
from tests.support.gateway import BEARER, chat_body

pytestmark = pytest.mark.slow
# Several processes import the gateway at once, on what may be two busy cores.
PATIENCE = 60.0


@pytest.fixture
def stack() -> Iterator[Stack]:
    with running_stack() as stack:
        yield stack


@dataclass
class Processes:
    """A gateway of several processes."""

    parent: "subprocess.Popen[str]"
    url: str

    def members(self) -> set[int]:
        return {child.pid for child in psutil.Process(self.parent.pid).children()}

    def client(self) -> httpx.Client:
        """A client of a connection of its own, which one of the processes accepts."""
        return httpx.Client(base_url=self.url, headers=BEARER, timeout=PATIENCE)

    def wait_for_both(self) -> None:
        """Waits until both have answered: a process still imports when it is first seen."""
        answered: set[int] = set()

        def have_answered() -> bool:
            with self.client() as client:
                answered.add(holder(self, port_of(client.get("/health/live"))))
            return len(answered) == 2

        soon(have_answered)


@contextmanager
def served(stack: Stack, *options: str) -> Iterator[Processes]:
    command = [sys.executable, "-m", "serving.gateway", "--port", "0", "--target", stack.target]
    command += ["--gateway-processes", "2", "--usage-db", ":memory:", *options]
    environment = os.environ | {KEY_VARIABLE: KEY, SERVICE_KEY_VARIABLE: KEY}
    reader: threading.Thread | None = None
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stderr is not None
            address = re.search(r"http://127\.0\.0\.1:\d+", parent.stderr.readline())
            assert address is not None
            processes = Processes(parent, address[0])
            # A parent whose lines nobody reads stands still when the pipe is full.
            reader = threading.Thread(target=parent.stderr.read, daemon=True)
            reader.start()
            processes.wait_for_both()
            yield processes
        finally:
            parent.kill()
            if reader is not None:
                reader.join(PATIENCE)


def soon(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def holder(processes: Processes, client_port: int) -> int:
    """The process that has accepted the connection from a port."""
    for pid in processes.members():
        for connection in psutil.Process(pid).net_connections("tcp"):
            if connection.raddr and connection.raddr.port == client_port:
                return pid
    raise AssertionError("nobody has the connection")


class Streaming:
    """A stream that has had its first two words, and waits for the third."""

    def __init__(self, response: httpx.Response, processes: Processes) -> None:
        self.pid = holder(processes, port_of(response))
        self._lines = response.iter_lines()
        self.words = 0
        while self.words < 2:
            self.words += '"content":"' in next(self._lines)

    def rest(self) -> str:
        return "\n".join(self._lines)


def streams_of_both(open_stack: ExitStack, processes: Processes) -> tuple[list[Streaming], int]:
    """A stream of each process, and the number of others that were dropped to get there."""
    streams: dict[int, Streaming] = {}
    dropped, deadline = 0, time.monotonic() + PATIENCE
    body = chat_body("one two !wait three", stream=True, max_tokens=50)
    while len(streams) < 2:
        assert time.monotonic() < deadline
        with ExitStack() as attempt:
            client = attempt.enter_context(processes.client())
            asking = client.stream("POST", "/chat/completions", json=body)
            response = attempt.enter_context(asking)
            if response.status_code == 429:  # the one that was dropped has not ended yet
                continue
            streaming = Streaming(response, processes)
            if streaming.pid in streams:
                dropped += 1
            else:
                streams[streaming.pid] = streaming
                open_stack.enter_context(attempt.pop_all())
    return list(streams.values()), dropped


def port_of(response: httpx.Response) -> int:
    socket = response.extensions["network_stream"].get_extra_info("socket")
    return int(socket.getsockname()[1])


def test_a_limit_is_exact_over_processes_and_both_drain(stack: Stack) -> None:
    with served(stack, "--max-requests-per-minute", "10") as processes:
        statuses: list[int] = []
        pids: set[int] = set()
        began = time.monotonic()
        while len(statuses) < 20 or len(pids) < 2:
            with processes.client() as client:
                response = client.post("/chat/completions", json=chat_body("one two"))
                statuses.append(response.status_code)
                pids.add(holder(processes, port_of(response)))
        # A minute's limit comes back by one in six seconds.
        come_back = int((time.monotonic() - began) / 6) + 1
        assert statuses[:10] == [200] * 10
        assert 10 <= statuses.count(200) <= 10 + come_back
        assert set(statuses) == {200, 429}
        with processes.client() as client:
            (row,) = client.get("/usage").json()["data"]
            assert row["requests"] == statuses.count(200)
            assert row["completion_tokens"] == 2 * statuses.count(200)
            counted = r'requests_total{.*route="/chat/completions",status="200"} (\S+)'
            texts: list[str] = []

            def is_counted() -> bool:
                texts.append(client.get("/metrics").text)
                return re.search(counted, texts[-1]) is not None

            soon(is_counted)
            (number,) = re.findall(counted, texts[-1])
            assert float(number) <= statuses.count(200)
        processes.parent.send_signal(signal.SIGTERM)
        assert processes.parent.wait(PATIENCE) == 0


def test_a_killed_process_takes_its_own_streams_and_nothing_else(stack: Stack) -> None:
    with (
        served(stack, "--max-concurrent-requests", "2") as processes,
        ExitStack() as open_stack,
        processes.client() as client,
    ):

        def is_let_in() -> bool:
            return client.post("/tokenize", json={"prompt": "a"}).status_code == 200

        (killed, whole), dropped = streams_of_both(open_stack, processes)
        assert not is_let_in()
        before = processes.members()
        os.kill(killed.pid, signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            killed.rest()
        with processes.client() as client:  # of a connection to the other one
            soon(is_let_in)
            stack.service.release()
            rest = whole.rest()
            assert '"content":" three"' in rest and rest.rstrip().endswith("data: [DONE]")
            (row,) = client.get("/usage").json()["data"]
        assert row["requests"] == dropped + 2
        assert row["completion_tokens"] == 2 * dropped + 2 + 3
        soon(lambda: len(processes.members() - before) == 1)
        processes.parent.send_signal(signal.SIGTERM)
        assert processes.parent.wait(PATIENCE) == 0


def test_answers_under_way_in_every_process_outlive_a_signal(stack: Stack) -> None:
    with served(stack) as processes, ExitStack() as open_stack:
        streams, _ = streams_of_both(open_stack, processes)
        processes.parent.send_signal(signal.SIGTERM)

        def refuses() -> bool:
            with processes.client() as client:
                return client.get("/health/ready").status_code == 503

        soon(refuses)
        stack.service.release()
        assert all(stream.rest().rstrip().endswith("data: [DONE]") for stream in streams)
        assert processes.parent.wait(PATIENCE) == 0
