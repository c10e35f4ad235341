"""Starting the real processes as a user does, and ending them by their id."""

import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = str(Path(sys.executable).with_name("mixtral-jax"))


@dataclass
class Server:
    """A running `mixtral-jax serve`, or `make serve`, that has announced itself."""

    process: "subprocess.Popen[str]"
    url: str
    target: str
    key: str  # the one in MIXTRAL_JAX_API_KEY
    curl: str
    banner: str  # all that was printed until then
    seconds: float  # from the start to the announcement
    said: list[str]  # lines after that; whole when the process has ended

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


# Below those that the system hands to clients, so that no connection takes one.
_PORTS = range(10_000, 32_000)
_handed_out: set[int] = set()


def free_ports(count: int) -> list[int]:
    """Neighbours. They are bound seconds later: none is handed out twice, nor by two workers."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    size = len(_PORTS) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = _PORTS[worker * size : (worker + 1) * size]
    while True:
        first = random.SystemRandom().choice(own[: size - count + 1])
        ports = range(first, first + count)
        if not _handed_out.isdisjoint(ports):
            continue
        with suppress(OSError), ExitStack() as stack:
            for port in ports:
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            _handed_out.update(ports)
            return list(ports)


def serve_command(model: Path | str, *options: str) -> list[str]:
    """`mixtral-jax serve` at ports that are free."""
    port, grpc_port = map(str, free_ports(2))
    command = [COMMAND, "serve", "--model", str(model), "--port", port, "--grpc-port", grpc_port]
    return [*command, *options]


def environment(**changes: str) -> dict[str, str]:
    """What a user's shell has, without a key."""
    inherited = {k: v for k, v in os.environ.items() if k != "MIXTRAL_JAX_API_KEY"}
    # What a server writes shall not be added to what the user's own server has written.
    state = str(Path(tempfile.gettempdir()) / "mixtral-jax-tests")
    return {**inherited, "JAX_PLATFORMS": "cpu", "XDG_STATE_HOME": state, **changes}


@contextmanager
def running(command: list[str], timeout: float = 240, **changes: str) -> Iterator[Server]:
    """Runs a serve command until the block ends; its output is kept for errors.

    `changes` are of its environment. A user who does not sit at a terminal sets the key.
    """
    changes.setdefault("MIXTRAL_JAX_API_KEY", secrets.token_hex(16))
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    seen = ""
    reader: threading.Thread | None = None
    try:
        while "curl -sN" not in seen:
            line = process.stdout.readline()
            seen += line
            assert line, f"ended with status {process.wait()}: {seen}"
            assert time.monotonic() - started < timeout, seen
        # A server whose lines nobody reads stands still when the pipe is full.
        said: list[str] = []
        reader = threading.Thread(target=said.extend, args=(process.stdout,), daemon=True)
        reader.start()
        fields = dict(re.findall(r"^(HTTP|gRPC) +(\S+)$", seen, re.MULTILINE))
        yield Server(
            process,
            fields["HTTP"],
            fields["gRPC"],
            changes["MIXTRAL_JAX_API_KEY"],
            seen[seen.index("curl -sN") :].strip(),
            seen,
            time.monotonic() - started,
            said,
        )
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)
        if reader is not None:
            reader.join(5)
        process.stdout.close()
