"""Replicas of `python -m serving` and a gateway before them, as an operator without Kubernetes."""

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from tests.support.servers import ROOT, environment, free_ports

SERVICE_KEY = "the-key-of-the-gateway"
API_KEY = "the-key-of-a-caller"


@dataclass
class Running:
    """A process whose lines on stderr are kept."""

    process: "subprocess.Popen[str]"
    lines: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self.changed:
                self.lines.append(line.rstrip("\n"))
                self.changed.notify_all()
        with self.changed:
            self.changed.notify_all()

    def until(self, pattern: str, timeout: float = 120.0) -> str:
        """Waits for a line that has the pattern, and returns it."""

        def matching() -> list[str]:
            return [line for line in self.lines if re.search(pattern, line)]

        with self.changed:
            found = self.changed.wait_for(lambda: matching() or self.process.poll(), timeout)
            assert found and matching(), "\n".join(self.lines)
            return matching()[0]

    def end(self, timeout: float = 60.0) -> int:
        """Sends SIGTERM, and returns the status when it has ended."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)


@contextmanager
def _started(command: Sequence[str]) -> Iterator[Running]:
    keys = {"MIXTRAL_JAX_SERVICE_KEY": SERVICE_KEY, "MIXTRAL_JAX_API_KEY": API_KEY}
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment(**keys, PYTHONPATH=str(ROOT)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    running = Running(process)
    reader = threading.Thread(target=running._read, daemon=True)
    reader.start()
    try:
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join(5)
        assert process.stderr is not None
        process.stderr.close()


@dataclass
class Deployment:
    """Replicas at fixed ports, and the gateway before them."""

    url: str
    ports: list[int]
    replicas: list[Running]
    gateway: Running
    _stack: ExitStack
    _options: Sequence[str]

    def start(self, number: int) -> Running:
        """Starts a replica at its port, in the place of one that has ended."""
        self.replicas[number] = self._stack.enter_context(
            _started(replica_command(self.ports[number], *self._options))
        )
        return self.replicas[number]


def replica_command(port: int, *options: str) -> list[str]:
    """Returns the arguments of `python -m` for a replica of a toy model."""
    return ["serving", "--model=tiny-random", f"--port={port}", *options]


@contextmanager
def deployment(
    count: int, options: Sequence[str] = (), gateway_options: Sequence[str] = ()
) -> Iterator[Deployment]:
    """Runs so many replicas, which are ready, and a gateway that has heard from them."""
    http, *ports = free_ports(count + 1)
    with ExitStack() as stack:
        replicas = [
            stack.enter_context(_started(replica_command(port, *options))) for port in ports
        ]
        targets = [f"--target=127.0.0.1:{port}" for port in ports]
        gateway = stack.enter_context(
            _started(["serving.gateway", f"--port={http}", *targets, *gateway_options])
        )
        gateway.until("listening on")
        for replica in replicas:
            replica.until("ready on")
        url = f"http://127.0.0.1:{http}"
        yield Deployment(url, list(ports), replicas, gateway, stack, options)
