"""Channels to model services, for the gateway and the Python client: targets, balancing, limits.

Several replicas are one gRPC channel. gRPC itself watches the health of each (grpc.health.v1),
takes the healthy ones in turn, and connects again to those that come back. A call that a replica
refuses as UNAVAILABLE or RESOURCE_EXHAUSTED before its first message is repeated at another
replica, unless so many are refused that all of them must be full. After its first message a call is
never repeated, because its tokens have been seen.
"""

import ipaddress
import json
import re
from collections.abc import Sequence

INFERENCE = "mixtral.v1.Inference"  # the service whose health is watched
# The longest message in bytes. An answer to Tokenize is several times as long as its text.
MAX_RECEIVED = 64 * 2**20
# The number of replicas that a call may try, one after the other, before its first message.
_MAX_REPLICAS_TRIED = 3
# Methods that may be repeated. Drain is not: it would end a second replica.
_REPEATED = ("Generate", "GetModelInfo", "Tokenize", "Detokenize", "GetMetrics")

_OPTIONS: tuple[tuple[str, int], ...] = (
    # A service is a neighbour: a proxy set for the internet must not stand between.
    ("grpc.enable_http_proxy", 0),
    # The time that an attempt to connect may take; calls that wait for it then fail.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    # A service that comes back is found within seconds, where gRPC's own default is two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # The soonest that a name is resolved again when a replica is gone; the default is 30 seconds.
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
    # A peer whose machine is gone closes nothing; only pings find that out.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # a minute by default, despite the line above
    ("grpc.max_receive_message_length", MAX_RECEIVED),
)
_HAS_SCHEME = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract):")


def target_of(targets: Sequence[str]) -> str:
    """Joins several targets to the one target that gRPC takes.

    Args:
        targets: Strings such as HOST:PORT, a list of those with commas, or a gRPC name such as
            dns:///models:50051, behind which there may be any number of addresses. If there are
            several, all must be IP addresses of one family.

    Returns:
        For `["10.0.0.1:50051", "10.0.0.2:50051"]`, "ipv4:10.0.0.1:50051,10.0.0.2:50051".

    Raises:
        ValueError: A target is empty, or several are no IP addresses of one family.
    """
    addresses: list[str] = []
    for target in targets:
        addresses += [target] if _HAS_SCHEME.match(target) else target.split(",")
    addresses = [address.strip() for address in addresses]
    if not addresses or "" in addresses:
        raise ValueError("a target is empty; give HOST:PORT of a model service")
    if len(addresses) == 1:
        return addresses[0]
    families = {_family(address) for address in addresses}
    if len(families) > 1:
        raise ValueError("several targets must all be IPv4 or all IPv6 addresses")
    return f"{families.pop()}:{','.join(addresses)}"


def join_address(host: str, port: int) -> str:
    """Returns HOST:PORT, with brackets around an IPv6 address as in "[::1]:8000" (RFC 3986)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def options_for(target: str) -> list[tuple[str, int | str]]:
    """Returns the options of a channel to `target`, which `target_of` has made."""
    config: dict[str, object] = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": INFERENCE},
    }
    if _HAS_SCHEME.match(target):  # else there is a single replica: the client decides on retries
        config["methodConfig"] = [
            {
                "name": [{"service": INFERENCE, "method": method} for method in _REPEATED],
                "retryPolicy": {
                    "maxAttempts": _MAX_REPLICAS_TRIED,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "0.5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
                },
            }
        ]
        # A hundred refusals at once are repeated, as many as a replica that ends may cause; beyond
        # them one for each five calls that succeed, or else overload would multiply itself.
        config["retryThrottling"] = {"maxTokens": 200, "tokenRatio": 0.2}
    return [*_OPTIONS, ("grpc.service_config", json.dumps(config))]


def _family(target: str) -> str:
    host, _, port = target.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        address = None
    if address is None or not port.isdecimal() or (address.version == 6) != host.startswith("["):
        raise ValueError(
            f"{target!r} is one of several targets and must be an IP address and a port; "
            "for names give one target such as dns:///models:50051 that has several addresses"
        )
    return f"ipv{address.version}"
