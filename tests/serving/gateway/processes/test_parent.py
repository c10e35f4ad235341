"""A process that cannot start is given up; the whole is in tests/end_to_end."""

import socket

import pytest

from serving.child import SupervisorError
from serving.gateway.processes.parent import run_processes


def test_processes_that_cannot_start_end_the_parent() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(SupervisorError, match="gateway process . ended with status"),
    ):
        run_processes(2, ["--no-such-flag"], listener, "/nowhere", 1.0)
