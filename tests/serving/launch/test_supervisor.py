"""What the supervisor does with its children: addresses, readiness, order of the end."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving.launch.supervisor import Addresses, SupervisorError, run_follower, stop
from serving.parent import READY_VARIABLE
from tests.support.servers import free_ports


def test_a_follower_says_itself_that_it_has_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It joins and is lost at once, joins again, and is then told to end."""
    (tmp_path / "serving").mkdir()
    (tmp_path / "serving" / "__init__.py").touch()
    (tmp_path / "serving" / "__main__.py").write_text(
        "import os, pathlib, sys\n"
        "seen = pathlib.Path(__file__).with_name('seen')\n"
        f"os.write(int(os.environ[{READY_VARIABLE!r}]), b'1')\n"
        "if seen.exists(): sys.exit(0)\n"
        "seen.touch(); sys.exit(1)\n"
    )
    monkeypatch.chdir(tmp_path)
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
    ready: list[str] = []
    run_follower(environment, [], lambda: ready.append("ready"), drain_seconds=5)
    assert ready == ["ready"]
    said = capfd.readouterr().err.splitlines()
    assert said == ["mixtral-jax: the follower ended with status 1; it is started again now"]


@pytest.mark.parametrize(
    ("host", "tls", "url", "target"),
    [
        ("127.0.0.1", False, "http://127.0.0.1:8000", "127.0.0.1:50051"),
        ("::1", False, "http://[::1]:8000", "[::1]:50051"),
        ("::", True, "https://[::]:8000", "127.0.0.1:50051"),
    ],
)
def test_addresses(host: str, tls: bool, url: str, target: str) -> None:
    addresses = Addresses(host=host, port=8000, grpc_port=50051, tls=tls)
    assert (addresses.url, addresses.target) == (url, target)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_that_is_taken_is_named(host: str) -> None:
    port, other = free_ports(2)
    addresses = Addresses(host=host, port=port, grpc_port=other)
    addresses.check()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server((host, port), family=family),
        pytest.raises(SupervisorError, match=f":{port} .Address already in use.; stop what"),
    ):
        addresses.check()


def test_the_gateway_gets_its_signal_before_the_service(tmp_path: Path) -> None:
    """Each notes when the signal came; the first ends before the delay is over."""
    program = (
        "import pathlib, signal, sys, time\n"
        "file, patience = pathlib.Path(sys.argv[1]), float(sys.argv[2])\n"
        "def end(*_):\n"
        "    with file.open('a') as log: log.write(sys.argv[3] + ' told\\n')\n"
        "    time.sleep(patience)\n"
        "    with file.open('a') as log: log.write(sys.argv[3] + ' ended\\n')\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('x', flush=True)\n"
        "time.sleep(60)\n"
    )
    log = tmp_path / "log"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(log), patience, name], stdout=subprocess.PIPE
        )
        for name, patience in (("gateway", "0.2"), ("service", "0"))
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
    began = time.monotonic()
    stop(processes, 40.0, 30.0)
    assert time.monotonic() - began < 20.0  # it did not wait for the whole delay
    words = ["gateway told", "gateway ended", "service told", "service ended"]
    assert log.read_text().splitlines() == words
    assert [process.returncode for process in processes] == [0, 0]


def test_the_signals_of_profiles_go_to_a_process_that_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before it serves, such a signal would kill it."""
    (tmp_path / "serving").mkdir()
    (tmp_path / "serving" / "__init__.py").touch()
    (tmp_path / "serving" / "__main__.py").write_text(
        "import os, signal, sys, time\n"
        "os.kill(os.getppid(), signal.SIGUSR1)\n"
        "time.sleep(0.5)\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('start', file=sys.stderr, flush=True))\n"
        "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(0))\n"
        f"os.write(int(os.environ[{READY_VARIABLE!r}]), b'1')\n"
        "while True: time.sleep(0.1)\n"
    )
    monkeypatch.chdir(tmp_path)
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}

    def ready() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR2)

    run_follower(environment, [], ready, drain_seconds=5)
    assert capfd.readouterr().err.splitlines() == [
        "mixtral-jax: the follower does not serve yet: no profile is started or ended",
        "start",
    ]
