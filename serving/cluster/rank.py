"""Which process of how many this is, where one model runs on several hosts: the flags, checked.

All processes are given the same coordinator, HOST:PORT of process 0. At PORT JAX finds the devices
of all; at the next port the leader tells its followers what to launch (serving/group.py). Both, and
the collectives, are for a network that nobody else is in: nothing of them is encrypted. The key of
the group keeps out who should not join by mistake or from next door.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from serving.access.config import is_loopback
from serving.access.keyring import check_key

GROUP_KEY_VARIABLE = "MIXTRAL_JAX_GROUP_KEY"
TIMEOUT = 300.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """A process of a group of at least two."""

    host: str  # of process 0, as given; an IPv6 address without brackets
    port: int
    count: int
    id: int
    timeout: float = TIMEOUT  # seconds that processes wait for one another
    key: str | None = None

    @classmethod
    def of_flags(
        cls,
        coordinator: str | None,
        count: int | None,
        process_id: int | None,
        timeout: float | None,
        environment: Mapping[str, str],
    ) -> "Place | None":
        """What the flags say; None without them, or for a single process, which needs no others.

        Raises ValueError, which names the flag.
        """
        if coordinator is None:
            given = {
                "--num-processes": count,
                "--process-id": process_id,
                "--coordinator-timeout": timeout,
            }
            for flag, value in given.items():
                if value is not None:
                    raise ValueError(f"{flag} needs --coordinator HOST:PORT, of process 0")
            return None
        if count is None or process_id is None:
            raise ValueError(
                "--coordinator needs --num-processes and --process-id: how many processes there "
                "are, and which of them this is"
            )
        if count < 1:
            raise ValueError(f"--num-processes is {count}; it must be at least 1")
        if not 0 <= process_id < count:
            raise ValueError(
                f"--process-id is {process_id}; with --num-processes {count} it is one of 0 to "
                f"{count - 1}"
            )
        host, port = _host_and_port(coordinator)
        if count == 1:
            return None
        key = environment.get(GROUP_KEY_VARIABLE) or None
        if key is None and not is_loopback(host):
            raise ValueError(
                f"{GROUP_KEY_VARIABLE} is not set; where processes are on several hosts it holds "
                "a key, the same for all, that those must show who join"
            )
        if key is not None:
            try:
                check_key(key)
            except ValueError as error:
                raise ValueError(f"{GROUP_KEY_VARIABLE} cannot be used: {error}") from None
        seconds = TIMEOUT if timeout is None else timeout
        return cls(host=host, port=port, count=count, id=process_id, timeout=seconds, key=key)

    @property
    def is_leader(self) -> bool:
        return self.id == 0

    @property
    def is_local(self) -> bool:
        """Whether all processes are on this machine."""
        return is_loopback(self.host)

    @property
    def coordinator(self) -> str:
        return f"{self._written_host}:{self.port}"

    @property
    def target(self) -> str:
        """Where the leader tells what to launch."""
        return f"{self._written_host}:{self.port + 1}"

    @property
    def _written_host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def add_place_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--coordinator", metavar="HOST:PORT", help="of process 0; it takes the next port too")
    add("--num-processes", type=int, metavar="N", help="that the model runs in")
    add("--process-id", type=int, metavar="I", help="which of them this is; 0 serves")
    add(
        "--coordinator-timeout",
        type=float,
        metavar="SECONDS",
        help=f"processes wait so long for one another; default: {TIMEOUT:.0f}",
    )


def place_of(options: argparse.Namespace, environment: Mapping[str, str]) -> Place | None:
    """What the flags of `add_place_flags` say; errors as `Place.of_flags`."""
    return Place.of_flags(
        options.coordinator,
        options.num_processes,
        options.process_id,
        options.coordinator_timeout,
        environment,
    )


def _host_and_port(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16 - 1:
        raise ValueError(
            f"--coordinator is {coordinator!r}; give HOST:PORT of process 0, where the port after "
            "it is free too"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)
