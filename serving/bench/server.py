"""A server to be measured: started on free ports, awaited, and ended with the measurement."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import httpx

from serving.bench.load import BenchError, Endpoint
from serving.parent import PARENT_VARIABLE

_STOP_SECONDS = 60.0


@contextmanager
def started(
    command: Sequence[str],
    ready: str,
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float = 900.0,
) -> Iterator["subprocess.Popen[bytes]"]:
    """Runs a server until the block ends; enters the block when the URL `ready` answers with 200.

    Args:
        command: The program and its arguments.
        ready: URL that answers with status 200 when the server can be used.
        environment: Variables added to those of this process.
        timeout: Seconds that the server may take to start.

    Raises BenchError, with the last lines that the server printed, if it ends before or takes
    longer.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            env={
                **os.environ,
                # A signal that comes while Popen works leaves no handle by which to end the server.
                PARENT_VARIABLE: str(os.getpid()),
                **(environment or {}),
            },
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for this process, which then stops the server
        )
        try:
            deadline = time.monotonic() + timeout
            while not _answers(ready):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    printed = log.read().decode(errors="replace").strip()[-2000:]
                    raise BenchError(f"{command[0]} did not start; it said:\n{printed}")
                time.sleep(0.2)
            yield process
        finally:
            stop(process)


def stop(process: "subprocess.Popen[bytes] | subprocess.Popen[str]") -> None:
    """Ends a process with SIGINT, and with SIGKILL if it takes too long or a signal interrupts."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_STOP_SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def served(model: str, options: Mapping[str, object]) -> Iterator[Endpoint]:
    """Serves a checkpoint by `mixtral-jax serve` on free ports until the block ends.

    `options` are further flags by their names; those with the value None are left out.
    """
    port, grpc_port = free_ports(2)
    key = secrets.token_hex(16)
    endpoint = Endpoint(url=f"http://127.0.0.1:{port}", key=key)
    flags = {
        "model": model,
        "port": port,
        "grpc-port": grpc_port,
        "usage-db": ":memory:",
        **options,
    }
    command = [sys.executable, "-m", "mixtral_jax.cli", "serve"]
    command += [f"--{name}={value}" for name, value in flags.items() if value is not None]
    with started(command, f"{endpoint.url}/health/ready", environment={"MIXTRAL_JAX_API_KEY": key}):
        yield endpoint


def free_ports(count: int) -> list[int]:
    """Returns ports of 127.0.0.1 that nobody listens on just now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [server.getsockname()[1] for server in sockets]
    finally:
        for server in sockets:
            server.close()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
