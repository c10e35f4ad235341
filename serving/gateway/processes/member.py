"""A gateway process among several: what it is given by its parent, and its share of limits."""

import math
import os
import socket
from collections.abc import Mapping
from dataclasses import replace

from serving.accounting.config import AccountingConfig
from serving.accounting.ledger_client import SharedAccounts
from serving.accounting.ledger_server import LEDGER_VARIABLE
from serving.gateway.http.body import LIMIT
from serving.gateway.http.body_room import ROOM
from serving.gateway.http.limits import HttpLimits
from serving.gateway.processes.parent import LISTENER_VARIABLE
from serving.parent import beat


class Member:
    """This process, as its parent has started it.

    Args:
        config: The settings of accounting.
        environment: The variables of this process.

    Attributes:
        listener: The socket at which it accepts connections.
        accounts: The accounts that it shares.

    Raises:
        SetupError: The parent's ledger cannot be reached.
    """

    def __init__(
        self, config: AccountingConfig, environment: Mapping[str, str] = os.environ
    ) -> None:
        self.listener = socket.socket(fileno=int(environment[LISTENER_VARIABLE]))
        self.accounts = SharedAccounts.of(config, environment[LEDGER_VARIABLE])

    @staticmethod
    def is_this(environment: Mapping[str, str] = os.environ) -> bool:
        """Returns whether this process has been started by such a parent."""
        return LISTENER_VARIABLE in environment

    def show_life(self, figures: bytes) -> bool:
        """Tells the parent that this process goes on, and its figures; called every second.

        Returns False if the process must end, because the ledger is lost.
        """
        self.accounts.tell_figures(figures)
        if self.accounts.was_lost:
            return False
        beat()
        return True


def http_share(limits: HttpLimits, processes: int) -> HttpLimits:
    """Returns the limits of one process: connections are divided, and rounded up."""
    return replace(
        limits,
        max_connections=math.ceil(limits.max_connections / processes),
        max_connections_per_address=math.ceil(limits.max_connections_per_address / processes),
    )


def room_share(processes: int) -> int:
    """Returns the bytes of large bodies in one process: a share, which must hold one of them."""
    return max(ROOM // processes, 2 * LIMIT)
