"""Starts and watches the two processes of `mixtral-jax serve`: the service and the gateway.

Where a model runs on several hosts, each host has a supervisor; only that of process 0 has a
gateway. A process of a group ends with the first of the others that is lost, and is started again,
and so the group comes together again.

They run in sessions of their own, so that Ctrl-C reaches the supervisor alone, which ends them by
SIGTERM: running answers finish, and new requests are refused meanwhile. SIGUSR1 and SIGUSR2 are
passed on to the service, which starts and ends profiles by them.

A process that dies is started again (child.py): the first time at once, then after longer and
longer waits, until it has served for a minute. The other one goes on, and the gateway answers 503
until the service is back. A process that dies before it could serve is given up after a few starts;
if it is the very first start, at once, because the reason will not go away by itself. A process
that ends with status 0 was told to end, by Drain or a signal of its own; then the supervisor ends
everything.

A process that stands still is killed, and so it is started again: the service when its heartbeat
stops for longer than a step may take, the gateway when it does not answer for a minute.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from serving.channel import join_address
from serving.child import Child, Probe, SupervisorError
from serving.flags import KEY_VARIABLE, SERVICE_KEY_VARIABLE
from serving.parent import PARENT_VARIABLE, READY_VARIABLE
from serving.ports import hold_port

_OF_SERVICE = (signal.SIGUSR1, signal.SIGUSR2)  # they start and end a profile
_STOP_SECONDS = 10.0  # time that a process may take to end after its drain
# Time that a heartbeat may take beyond the time of a step. It comes every second or a little later,
# so that a process that stops is killed within 2 s beyond the time of a step.
_LATE_SECONDS = 1.5
_FOLLOWER_SECONDS = 15.0  # the same for a follower, whose heart beats also in a long step


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
        return f"{'https' if self.tls else 'http'}://{join_address(self.host, self.port)}"

    @property
    def page(self) -> str:
        """The URL of the page to chat with, for a browser on this machine."""
        anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        host = join_address(anywhere.get(self.host, self.host), self.port)
        return f"{'https' if self.tls else 'http'}://{host}/"

    @property
    def grpc_host(self) -> str:
        """The address of gRPC: with TLS this machine's own, because the keys are not encrypted."""
        return "127.0.0.1" if self.tls else self.host

    @property
    def target(self) -> str:
        """HOST:PORT of gRPC."""
        return join_address(self.grpc_host, self.grpc_port)

    def check(self) -> None:
        """Raises SupervisorError if a port is taken, before minutes of loading."""
        if self.port == self.grpc_port:
            raise SupervisorError(f"--port and --grpc-port are both {self.port}; give two ports")
        places = (
            (self.host, self.port, "--port"),
            (self.grpc_host, self.grpc_port, "--grpc-port"),
        )
        for host, port, variable in places:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            try:
                with socket.create_server((host, port), family=family):
                    pass
            except OSError as error:
                # Python writes the address into the text of this error, too.
                taken = error.errno == errno.EADDRINUSE
                reason = os.strerror(errno.EADDRINUSE) if taken else str(error)
                raise SupervisorError(
                    f"cannot listen on {join_address(host, port)} ({reason}); "
                    f"stop what runs there or choose another with {variable}"
                ) from None


@contextlib.contextmanager
def kept_ports(count: int) -> Iterator[tuple[int, ...]]:
    """Keeps free ports on 127.0.0.1 for processes of ours that share them, until the block ends.

    Raises SupervisorError if there are none.
    """
    with contextlib.ExitStack() as stack:
        try:
            held = [stack.enter_context(hold_port("127.0.0.1", 0)) for _ in range(count)]
        except OSError as error:
            raise SupervisorError(f"no port of 127.0.0.1 is free ({error.strerror})") from None
        yield tuple(socket_.getsockname()[1] for socket_ in held)


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
    drain_delay: float = 0.0,
    step_timeout: float | None = None,
) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP; calls `ready` when the first request can come.

    Args:
        addresses: Where both listen.
        environment: The environment of both.
        service_options: The command line of the service.
        gateway_options: The command line of the gateway.
        ready: Called once.
        drain_seconds: Seconds that running answers may take to finish.
        drain_delay: Seconds that the gateway serves on after a signal; the service gets its signal
            after them.
        step_timeout: Seconds that a step of the engine may take, where the service has a heartbeat.

    Raises:
        SupervisorError: A process failed for good.
    """
    addresses.check()
    environment = {**environment, PARENT_VARIABLE: str(os.getpid())}
    beat_seconds = None if step_timeout is None else step_timeout + _LATE_SECONDS
    service = Child(
        "service", ["serving", *service_options], environment, beat_seconds=beat_seconds
    )
    probe = Probe(answers=lambda: _answers(addresses, "live"))
    gateway = Child("gateway", ["serving.gateway", *gateway_options], environment, probe=probe)
    children = (service, gateway)
    with _Signals() as signals:
        try:
            announced = False
            while not signals.received and not any(child.was_told_to_end for child in children):
                _pass_on(signals.take(), service)
                for child in children:
                    child.keep_running()
                for child, route in ((gateway, "live"), (service, "ready")):
                    if not child.has_served and _answers(addresses, route):
                        child.note_serving()
                if not announced and service.has_served and gateway.has_served:
                    announced = True
                    ready()
                time.sleep(0.2)
        finally:
            stop(
                [child.process for child in (gateway, service) if child.process],
                drain_delay + drain_seconds + _STOP_SECONDS,
                drain_delay,
            )
            service.close()


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
    child = Child(
        "follower",
        ["serving", *options],
        {**environment, **variables},
        (writing,),
        beat_seconds=_FOLLOWER_SECONDS,
    )
    with _Signals() as signals:
        try:
            announced = False
            while not signals.received and not child.was_told_to_end:
                _pass_on(signals.take(), child)
                # This comes first, because a process may become ready and die between two looks.
                with contextlib.suppress(BlockingIOError):
                    if os.read(reading, 16):
                        child.note_serving()
                child.keep_running()
                if child.has_served and not announced:
                    announced = True
                    ready()
                time.sleep(0.2)
        finally:
            stop([child.process] if child.process else [], drain_seconds + _STOP_SECONDS)
            child.close()
            os.close(reading)
            os.close(writing)


def _pass_on(numbers: Sequence[int], child: Child) -> None:
    """Sends signals to the process that has the model; to one that serves, as others die of it."""
    for number in numbers:
        if child.process is not None and child.has_served:
            child.process.send_signal(number)
        else:
            text = "does not serve yet: no profile is started or ended"
            print(f"mixtral-jax: the {child.name} {text}", file=sys.stderr, flush=True)


class _Signals:
    """Notes SIGINT, SIGTERM and SIGHUP instead of being interrupted; a second signal kills.

    It also notes SIGUSR1 and SIGUSR2, which are for the process that has the model.
    """

    def __enter__(self) -> "_Signals":
        self.received = False
        self._others: list[int] = []
        numbers = [signal.SIGINT, signal.SIGTERM, *_OF_SERVICE]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else it was started by nohup
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def take(self) -> list[int]:
        """Returns the signals for the process that has the model, each of them once."""
        taken, self._others = self._others, []
        return taken

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in _OF_SERVICE:
            self._others.append(number)
            return
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


def stop(
    processes: Sequence["subprocess.Popen[bytes]"], seconds: float, delay: float = 0.0
) -> None:
    """Sends SIGTERM to the first process, and to the others `delay` seconds later or when the first
    has ended. Sends SIGKILL to all that have not ended after `seconds`, or at another signal."""
    deadline = time.monotonic() + seconds
    for i, process in enumerate(processes):
        if i == 1:
            try:
                processes[0].wait(delay)
            except subprocess.TimeoutExpired:
                pass
            except KeyboardInterrupt:
                deadline = 0.0
        process.terminate()
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            deadline = 0.0  # for the others too
            process.kill()
            process.wait()
