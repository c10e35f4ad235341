"""Starts and watches the two processes of `mixtral-jax serve`: the service and the gateway.

Where a model runs on several hosts, each host has a supervisor; only that of process 0 has a
gateway. A process of a group ends with the first of the others that is lost, and is started again,
and so the group comes together again.

They run in sessions of their own, so that Ctrl-C reaches the supervisor alone, which ends them by
SIGTERM: running answers finish, and new requests are refused meanwhile.

A process that dies after it has served is started again at once. The other one goes on, and the
gateway answers 503 until the service is back. A process that dies before it could serve is started
again a few times, after longer and longer waits; if it is the very first start, the supervisor
gives up, because the reason will not go away by itself. A process that ends with status 0 was told
to end, by Drain or a signal of its own; then the supervisor ends everything.
"""

import contextlib
import errno
import http.client
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from serving.errors import SetupError
from serving.flags import KEY_VARIABLE, SERVICE_KEY_VARIABLE
from serving.parent import PARENT_VARIABLE, READY_VARIABLE

_STOP_SECONDS = 10.0  # time that a process may take to end after its drain
_MAX_FAILURES = 4  # starts in a row after which a process died before it could serve


class SupervisorError(SetupError):
    """A server that did not start, or died; the message names it and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Addresses of the two servers."""

    host: str
    port: int
    """Port of HTTP."""
    grpc_port: int
    tls: bool = False
    """Serve HTTP over TLS."""

    @property
    def url(self) -> str:
        """The URL of the gateway."""
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}"

    @property
    def grpc_host(self) -> str:
        """The address of gRPC: with TLS this machine's own, because the keys are not encrypted."""
        return "127.0.0.1" if self.tls else self.host

    @property
    def target(self) -> str:
        """HOST:PORT of gRPC."""
        return f"{self.grpc_host}:{self.grpc_port}"

    def check(self) -> None:
        """Raises SupervisorError if a port is taken, before minutes of loading."""
        if self.port == self.grpc_port:
            raise SupervisorError(f"--port and --grpc-port are both {self.port}; give two ports")
        places = (
            (self.host, self.port, "--port"),
            (self.grpc_host, self.grpc_port, "--grpc-port"),
        )
        for host, port, variable in places:
            try:
                with socket.create_server((host, port)):
                    pass
            except OSError as error:
                # Python writes the address into the text of this error, too.
                taken = error.errno == errno.EADDRINUSE
                reason = os.strerror(errno.EADDRINUSE) if taken else str(error)
                raise SupervisorError(
                    f"cannot listen on {host}:{port} ({reason}); "
                    f"stop what runs there or choose another with {variable}"
                ) from None


def environment_from(environment: Mapping[str, str], *, makes_key: bool) -> dict[str, str]:
    """Returns the environment with the key of the gateway, made up if there is none.

    With `makes_key` a missing key of clients is made up too. Keys have 32 characters.
    """
    made = {SERVICE_KEY_VARIABLE: secrets.token_hex(16)}
    if makes_key:
        made[KEY_VARIABLE] = secrets.token_hex(16)
    return {**environment, **{name: environment.get(name) or key for name, key in made.items()}}


def run(
    addresses: Addresses,
    environment: Mapping[str, str],
    service_options: Sequence[str],
    gateway_options: Sequence[str],
    ready: Callable[[], None],
    *,
    drain_seconds: float,
) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP; calls `ready` when the first request can come.

    Raises SupervisorError if a process fails for good.
    """
    addresses.check()
    environment = {**environment, PARENT_VARIABLE: str(os.getpid())}
    service = _Child("service", ["serving", *service_options], environment)
    gateway = _Child("gateway", ["serving.gateway", *gateway_options], environment)
    children = (service, gateway)
    with _Signals() as signals:
        try:
            announced = False
            while not signals.received and not any(child.was_told_to_end for child in children):
                for child in children:
                    child.keep_running()
                if not (service.has_served and gateway.has_served):
                    gateway.has_served = gateway.has_served or _answers(addresses, "live")
                    service.has_served = service.has_served or _answers(addresses, "ready")
                elif not announced:
                    announced = True
                    ready()
                time.sleep(0.2)
        finally:
            running = [child.process for child in children if child.process]
            _stop(running, drain_seconds + _STOP_SECONDS)


def run_follower(
    environment: Mapping[str, str],
    options: Sequence[str],
    ready: Callable[[], None],
    *,
    drain_seconds: float,
) -> None:
    """Keeps a follower running until SIGINT, SIGTERM or SIGHUP, or until its group ends; calls
    `ready` when it is in the group. Raises SupervisorError if it fails for good.
    """
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    variables = {PARENT_VARIABLE: str(os.getpid()), READY_VARIABLE: str(writing)}
    child = _Child("follower", ["serving", *options], {**environment, **variables}, (writing,))
    with _Signals() as signals:
        try:
            announced = False
            while not signals.received and not child.was_told_to_end:
                # This comes first, because a process may become ready and die between two looks.
                with contextlib.suppress(BlockingIOError):
                    child.has_served |= bool(os.read(reading, 16))
                child.keep_running()
                if child.has_served and not announced:
                    announced = True
                    ready()
                time.sleep(0.2)
        finally:
            _stop([child.process] if child.process else [], drain_seconds + _STOP_SECONDS)
            os.close(reading)
            os.close(writing)


class _Child:
    """A process that is started, and started again. It inherits the file descriptors `pipes`."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: dict[str, str],
        pipes: Sequence[int] = (),
    ) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.has_served = False  # since its last start; set by the supervisor
        self._name = name
        self._command = [sys.executable, "-m", *command]
        self._environment = environment
        self._pipes = pipes
        self._start_at = 0.0  # time.monotonic()
        self._failures = 0
        self._has_ever_served = False

    @property
    def was_told_to_end(self) -> bool:
        return self.process is not None and self.process.poll() == 0

    def keep_running(self) -> None:
        """Starts it if it does not run and it is time to. Raises SupervisorError to give up."""
        if self.process is not None:
            status = self.process.poll()
            if status is None:
                return
            if status != 0:
                self.process = None
                self._note_death(status)
        elif time.monotonic() >= self._start_at:
            self.has_served = False
            self.process = subprocess.Popen(
                self._command,
                env=self._environment,
                start_new_session=True,
                pass_fds=self._pipes,
            )

    def _note_death(self, status: int) -> None:
        how = f"status {status}" if status > 0 else signal.Signals(-status).name
        self._has_ever_served |= self.has_served
        self._failures = 0 if self.has_served else self._failures + 1
        if not self._has_ever_served:
            raise SupervisorError(f"the {self._name} ended with {how}; see above")
        if self._failures == _MAX_FAILURES:
            raise SupervisorError(
                f"the {self._name} ended {_MAX_FAILURES} times before it could serve, the last "
                f"time with {how}; see above"
            )
        delay = 2**self._failures - 1
        self._start_at = time.monotonic() + delay
        when = f"in {delay} s" if delay else "now"
        print(
            f"mixtral-jax: the {self._name} ended with {how}; it is started again {when}",
            file=sys.stderr,
            flush=True,
        )


class _Signals:
    """Notes SIGINT, SIGTERM and SIGHUP instead of being interrupted; a second signal kills."""

    def __enter__(self) -> "_Signals":
        self.received = False
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else it was started by nohup
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _answers(addresses: Addresses, what: str) -> bool:
    """Returns True if the gateway answers /health/live or /health/ready with status 200."""
    # Proxies are for other hosts, but urllib would use them for this host too.
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if addresses.tls:
        # The certificate need not name this address; clients check it for themselves.
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        handlers.append(urllib.request.HTTPSHandler(context=context))
    direct = urllib.request.build_opener(*handlers)
    try:
        with direct.open(f"{addresses.url}/health/{what}", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def _stop(processes: Sequence["subprocess.Popen[bytes]"], seconds: float) -> None:
    """Sends SIGTERM to all, and SIGKILL if that takes too long or another signal arrives."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            deadline = 0.0  # for the others too
            process.kill()
            process.wait()
