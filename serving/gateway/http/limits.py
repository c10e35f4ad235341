"""The limits of connections and requests, as far as they hold before a request is understood."""

import ipaddress
from dataclasses import dataclass

from serving.errors import SetupError


class HttpError(SetupError):
    """Limits that a gateway cannot work with; the message names the flag."""


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """Limits of connections and of the requests on them.

    Raises HttpError if an address of `forwarded_allow_ips` is none.
    """

    max_connections: int = 4096
    """Open connections of all clients."""
    max_connections_per_address: int = 512
    """Open connections of one address; of a network /64 where it is IPv6."""
    head_seconds: float = 10.0
    """Time that a request's head may take to arrive, and a TLS handshake."""
    body_seconds: float = 30.0
    """Time that a request's body may take to arrive."""
    keep_alive_seconds: float = 75.0
    """Time that a connection may be idle between two requests."""
    forwarded_allow_ips: tuple[str, ...] = ()
    """Addresses and networks of proxies whose X-Forwarded-For is believed; "*" stands for all."""
    rest_seconds: float = 10.0
    """Time that the rest of a body may take after its request has been answered."""
    write_seconds: float = 120.0
    """Time that a client may read nothing of what is sent to it."""
    head_bytes: int = 64 * 2**10
    """Bytes of a head, and of the trailers of a body."""
    head_fields: int = 256
    """Header fields of a request."""
    rest_bytes: int = 8 * 2**20
    """Bytes of a body that are still read after its request has been answered."""

    def __post_init__(self) -> None:
        self.proxies()

    def proxies(self) -> "Proxies":
        """Returns the addresses of `forwarded_allow_ips`."""
        return Proxies(self.forwarded_allow_ips)


class Proxies:
    """A set of addresses and networks.

    Args:
        texts: IP addresses, networks such as 10.0.0.0/8, or "*" for all.

    Raises:
        HttpError: A text is none of these.
    """

    def __init__(self, texts: tuple[str, ...]) -> None:
        self._has_all = "*" in texts
        try:
            self._networks = [ipaddress.ip_network(text) for text in texts if text != "*"]
        except ValueError as error:
            raise HttpError(
                f"--forwarded-allow-ips cannot be used: {error}; give an address, a network such "
                "as 10.0.0.0/8, or *"
            ) from None

    def __contains__(self, address: object) -> bool:
        if self._has_all or not self._networks:
            return self._has_all
        try:
            parsed = ipaddress.ip_address(str(address))
        except ValueError:
            return False
        return any(parsed in network for network in self._networks)
