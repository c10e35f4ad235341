"""Starts and watches the two processes of `mixtral-jax serve`: the service and the gateway.

They run in sessions of their own, so that Ctrl-C reaches the supervisor alone, which then stops the
gateway first and the service after it: answers under way can finish. If one of them dies, the other
is stopped too and `run` fails.
"""

import errno
import http.client
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

from serving.parent import PARENT_VARIABLE

KEY_VARIABLE = "MIXTRAL_JAX_API_KEY"
_STOP_SECONDS = 40.0  # a little more than the processes give their own streams


class SupervisorError(RuntimeError):
    """A server that did not start, or died; the message names it and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Addresses:
    host: str
    port: int
    grpc_port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def target(self) -> str:
        return f"{self.host}:{self.grpc_port}"

    def check(self) -> None:
        """Raises SupervisorError if a port is taken: better now than after a minute of loading."""
        if self.port == self.grpc_port:
            raise SupervisorError(f"--port and --grpc-port are both {self.port}; give two ports")
        for port, variable in ((self.port, "--port"), (self.grpc_port, "--grpc-port")):
            try:
                with socket.create_server((self.host, port)):
                    pass
            except OSError as error:
                # Python repeats the address in this one.
                taken = error.errno == errno.EADDRINUSE
                reason = os.strerror(errno.EADDRINUSE) if taken else str(error)
                raise SupervisorError(
                    f"cannot listen on {self.host}:{port} ({reason}); "
                    f"stop what runs there or choose another with {variable}"
                ) from None


def key_from(environment: dict[str, str]) -> str:
    """The key that clients must send: the environment's, or a new one of 32 characters."""
    return environment.get(KEY_VARIABLE) or secrets.token_hex(16)


def run(
    addresses: Addresses, key: str, service_options: Sequence[str], ready: Callable[[], None]
) -> None:
    """Serves until SIGINT or SIGTERM; calls `ready` when the first request can come.

    Raises SupervisorError if a process fails.
    """
    addresses.check()
    environment = {**os.environ, KEY_VARIABLE: key, PARENT_VARIABLE: str(os.getpid())}
    place = ["--host", addresses.host, "--port"]
    commands = {
        "service": ["serving", *place, str(addresses.grpc_port), *service_options],
        "gateway": [
            "serving.gateway", *place, str(addresses.port), "--target", addresses.target
        ],
    }  # fmt: skip
    processes: dict[str, subprocess.Popen[bytes]] = {}
    with _Signals() as signals:
        try:
            for name, command in commands.items():
                processes[name] = subprocess.Popen(
                    [sys.executable, "-m", *command], env=environment, start_new_session=True
                )
            announced = False
            while not signals.received:
                for name, process in processes.items():
                    if process.poll() is not None:
                        raise SupervisorError(
                            f"the {name} ended with status {process.returncode}; see above"
                        )
                if not announced and _is_ready(addresses.url):
                    announced = True
                    ready()
                time.sleep(0.2)
        finally:
            for process in reversed(processes.values()):
                _stop(process)


class _Signals:
    """Notes SIGINT and SIGTERM instead of being interrupted by them; a second one kills."""

    def __enter__(self) -> "_Signals":
        self.received = False
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _is_ready(url: str) -> bool:
    # Proxies are for other hosts; urllib would ask them for this one too.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/health/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM, and SIGKILL if that takes too long or the user insists."""
    try:
        process.terminate()
        process.wait(_STOP_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()
