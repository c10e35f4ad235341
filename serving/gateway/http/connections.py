"""The open connections of a gateway: how many there may be, and how long they may keep silent.

A connection is busy while a request of its is answered, and waits otherwise: for its TLS handshake,
for a head, or between two requests. Where all places are taken, the connection that has waited
longest makes room for a new one, so that idle connections keep nobody out. Only where every
connection is busy is a new one refused.
"""

import ipaddress
import logging
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field

from serving.gateway.http.limits import HttpLimits
from serving.gateway.http.metrics import GatewayMetrics
from serving.observe.logs import fields

# Refused connections share a line of the log that is written at most so often.
_LOG_SECONDS = 1.0

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Place:
    """The place of one connection; it waits until `work` is called.

    Attributes:
        end: Ends the connection at once, to make room for another.
    """

    _connections: "Connections"
    _address: str
    end: Callable[[], None]

    def work(self) -> None:
        """Says that a request is being answered."""
        self._connections._waits(self._address, self, False)

    def wait(self) -> None:
        """Says that no request is being answered, from now on."""
        self._connections._waits(self._address, self, True)

    def leave(self) -> None:
        """Gives the place back. May be called again."""
        self._connections._leave(self._address, self)


@dataclass(eq=False)
class _Peers:
    """The places of one address: all of them, and those that wait, longest first."""

    all: set[Place] = field(default_factory=set)
    waiting: dict[Place, None] = field(default_factory=dict)


class Connections:
    """Counts connections, and says whether there is room for another.

    Args:
        limits: The limits of connections.
        metrics: Counts refused connections.
        exempt: Addresses without a limit of their own, such as those of proxies.
    """

    def __init__(
        self, limits: HttpLimits, metrics: GatewayMetrics, exempt: Container[str] = ()
    ) -> None:
        self.limits = limits
        self.metrics = metrics
        self._exempt = exempt
        self._all = _Peers()
        self._by_address: dict[str, _Peers] = {}
        self._refused = 0  # since the last line of the log
        self._logged = -_LOG_SECONDS

    def __len__(self) -> int:
        """Returns the number of open connections."""
        return len(self._all.all)

    def take(self, address: str, end: Callable[[], None]) -> Place | None:
        """Returns a place for a connection from `address`; None if it is to be refused.

        Args:
            address: The client's IP address.
            end: Ends the connection at once.
        """
        network = _network(address)
        peers = self._by_address.get(network, _Peers())
        if address not in self._exempt:
            limit = self.limits.max_connections_per_address
            if len(peers.all) >= limit and not self._make_room(peers):
                self.refuse("address", address)
                return None
        if len(self._all.all) >= self.limits.max_connections and not self._make_room(self._all):
            self.refuse("total", address)
            return None
        place = Place(self, network, end)
        # Making room may have removed the last place of this address.
        for group in (self._all, self._by_address.setdefault(network, peers)):
            group.all.add(place)
            group.waiting[place] = None
        self.metrics.open_connections.set(len(self))
        return place

    def refuse(self, reason: str, address: str) -> None:
        """Counts a connection that was closed unserved, and logs it if no other was just now.

        Args:
            reason: "address" or "total" for the limits, "handshake" for TLS, "files" where the
                process may open no more.
            address: The client's IP address.
        """
        self.metrics.refused_connections.labels(reason).inc()
        self._refused += 1
        if (now := time.monotonic()) - self._logged >= _LOG_SECONDS:
            values = fields(client=address, reason=reason, number=self._refused)
            logger.warning("connections were refused", extra=values)
            self._logged, self._refused = now, 0

    def _make_room(self, peers: _Peers) -> bool:
        """Ends the connection that has waited longest; returns False if none waits."""
        place = next(iter(peers.waiting), None)
        if place is None:
            return False
        place.leave()
        place.end()
        self.metrics.ended_idle_connections.inc()
        return True

    def _waits(self, address: str, place: Place, is_waiting: bool) -> None:
        if place not in self._all.all:
            return
        for peers in (self._all, self._by_address[address]):
            if is_waiting:
                peers.waiting.setdefault(place)
            else:
                peers.waiting.pop(place, None)

    def _leave(self, address: str, place: Place) -> None:
        if place not in self._all.all:
            return
        own = self._by_address[address]
        for peers in (self._all, own):
            peers.all.discard(place)
            peers.waiting.pop(place, None)
        if not own.all:
            del self._by_address[address]
        self.metrics.open_connections.set(len(self))


def _network(address: str) -> str:
    """Returns an address under which one client's connections are counted.

    A client of IPv6 usually has a network /64 to choose addresses from (RFC 6177).
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
