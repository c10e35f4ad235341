"""The rank of a process, where several processes run one model.

All processes are given the same coordinator, HOST:PORT of process 0. At PORT JAX finds the devices
of all processes; at the next port the leader tells its followers what to launch
(serving/cluster/leader.py). Both ends of that stream prove that they have the key of the group, and
with certificates and the authority that has signed them it is encrypted, each end checking the
other's. JAX's port and the collectives are not: they are for a network that nobody else is in.
"""

from dataclasses import dataclass, field
from pathlib import Path

from serving.access.keyring import check_key
from serving.access.loopback import is_loopback
from serving.access.tls import ServerTls
from serving.errors import SetupError

TIMEOUT = 300.0
"""Seconds that processes wait for one another by default."""


class RankError(SetupError):
    """Flags of a group that do not fit together; the message names the flag."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """A process of a group of at least two. Raises RankError for values that make no group."""

    coordinator: str
    """HOST:PORT of process 0; the next port is used too."""
    num_processes: int
    process_id: int
    """Number of this process, from 0; process 0 leads."""
    coordinator_timeout: float = TIMEOUT
    """Seconds that processes wait for one another."""
    group_key: str | None = field(default=None, repr=False)
    """Key that the processes prove to one another to have; without one there is no group."""
    tls_cert: Path | None = None
    """Certificate chain of this process, for both roles; used where `tls_client_ca` is given."""
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    """Authority that has signed the certificates of all processes; turns TLS on."""

    def __post_init__(self) -> None:
        _check_numbers(self.num_processes, self.process_id)
        split_coordinator(self.coordinator)
        if self.group_key is None:
            raise RankError(
                "MIXTRAL_JAX_GROUP_KEY is not set; it holds a key, the same for all processes of "
                "the group, that a process must have to join"
            )
        check_key(self.group_key, "MIXTRAL_JAX_GROUP_KEY")
        self.tls()

    @classmethod
    def of_flags(
        cls,
        *,
        coordinator: str | None,
        num_processes: int | None,
        process_id: int | None,
        coordinator_timeout: float | None,
        group_key: str | None,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
        tls_client_ca: Path | None = None,
    ) -> "Rank | None":
        """Makes a rank of flags; None without flags, or for a group of a single process."""
        if coordinator is None:
            given = {
                "--num-processes": num_processes,
                "--process-id": process_id,
                "--coordinator-timeout": coordinator_timeout,
            }
            for flag, value in given.items():
                if value is not None:
                    raise RankError(f"{flag} needs --coordinator HOST:PORT, of process 0")
            return None
        if num_processes is None or process_id is None:
            raise RankError(
                "--coordinator needs --num-processes and --process-id: how many processes there "
                "are, and which of them this is"
            )
        _check_numbers(num_processes, process_id)
        split_coordinator(coordinator)
        if num_processes == 1:
            return None
        return cls(
            coordinator=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            coordinator_timeout=TIMEOUT if coordinator_timeout is None else coordinator_timeout,
            group_key=group_key,
            # Without the authority they are for other servers of this process alone.
            tls_cert=tls_cert if tls_client_ca else None,
            tls_key=tls_key if tls_client_ca else None,
            tls_client_ca=tls_client_ca,
        )

    def tls(self) -> ServerTls | None:
        """Reads this process's certificate and the authority of all; None without an authority.

        Raises AccessError if a file cannot be used.
        """
        if self.tls_client_ca is None:
            return None
        return ServerTls.of_flags(self.tls_cert, self.tls_key, self.tls_client_ca)

    @property
    def key(self) -> str:
        """Key of the group."""
        assert self.group_key is not None
        return self.group_key

    @property
    def host(self) -> str:
        """Host of process 0; an IPv6 address stands without brackets."""
        return split_coordinator(self.coordinator)[0]

    @property
    def port(self) -> int:
        """Port of process 0 at which JAX finds the devices of all processes."""
        return split_coordinator(self.coordinator)[1]

    @property
    def is_leader(self) -> bool:
        """True for process 0."""
        return self.process_id == 0

    @property
    def is_local(self) -> bool:
        """True if all processes are on this machine."""
        return is_loopback(self.host)

    @property
    def target(self) -> str:
        """HOST:PORT at which the leader tells its followers what to launch."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port + 1}"


def _check_numbers(num_processes: int, process_id: int) -> None:
    if num_processes < 1:
        raise RankError(f"--num-processes is {num_processes}; it must be at least 1")
    if not 0 <= process_id < num_processes:
        raise RankError(
            f"--process-id is {process_id}; with --num-processes {num_processes} it is one of 0 to "
            f"{num_processes - 1}"
        )


def split_coordinator(coordinator: str) -> tuple[str, int]:
    """Returns host and port of HOST:PORT, the host without brackets. Raises RankError."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16 - 1:
        raise RankError(
            f"--coordinator is {coordinator!r}; give HOST:PORT of process 0, where the port after "
            "it is free too"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)
