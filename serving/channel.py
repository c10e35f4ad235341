"""How the gateway and the Python client reach model services: targets, balancing, and its limits.

Several replicas are one gRPC channel. gRPC itself watches the health of each (grpc.health.v1), goes
round those that serve, and connects again to those that come back. A call that one of them refuses
as UNAVAILABLE or RESOURCE_EXHAUSTED before its first message is asked of another; after the first
message a call is never repeated, for its tokens have been seen.
"""

import ipaddress
import json
import re
from collections.abc import Sequence

INFERENCE = "mixtral.v1.Inference"  # whose health is watched, and whose calls are repeated
# Bytes of a message. An answer to Tokenize is several times its text.
MOST_RECEIVED = 64 * 2**20
# Calls before the first message that may be asked of so many replicas, one after the other.
_MOST_REPLICAS_ASKED = 3

_OPTIONS: tuple[tuple[str, int], ...] = (
    # A service is a neighbour: a proxy set for the internet must not stand between.
    ("grpc.enable_http_proxy", 0),
    # An attempt to connect may take so long; calls that wait for it then fail.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    # A service that comes back is found within seconds, where gRPC's own default is two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # So a name is asked again for new replicas when one is gone; the default is 30 seconds.
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
    # A peer whose machine is gone closes nothing: pings find out.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # by default a minute, whatever the line above says
    ("grpc.max_receive_message_length", MOST_RECEIVED),
)
_HAS_SCHEME = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract):")


def target_of(targets: Sequence[str]) -> str:
    """Several targets as the one that gRPC takes.

    Each is HOST:PORT, a list of those with commas, or a gRPC name such as dns:///models:50051,
    behind which there may be any number of addresses. More than one must be IP addresses of one
    family: `["10.0.0.1:50051", "10.0.0.2:50051"]` is "ipv4:10.0.0.1:50051,10.0.0.2:50051".

    Raises ValueError for anything else.
    """
    parts: list[str] = []
    for target in targets:
        parts += [target] if _HAS_SCHEME.match(target) else target.split(",")
    parts = [part.strip() for part in parts]
    if not parts or "" in parts:
        raise ValueError("a target is empty; give HOST:PORT of a model service")
    if len(parts) == 1:
        return parts[0]
    families = {_family(part) for part in parts}
    if len(families) > 1:
        raise ValueError("several targets must all be IPv4 or all IPv6 addresses")
    return f"{families.pop()}:{','.join(parts)}"


def options_for(target: str) -> list[tuple[str, int | str]]:
    """The options of a channel to `target`, as `target_of` wrote it."""
    config: dict[str, object] = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": INFERENCE},
    }
    if _HAS_SCHEME.match(target):  # else there is one replica, and the client decides on retries
        config["methodConfig"] = [
            {
                "name": [{"service": INFERENCE}],
                "retryPolicy": {
                    "maxAttempts": _MOST_REPLICAS_ASKED,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "0.5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
                },
            }
        ]
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
