"""Addresses of this machine that no other machine can reach."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Returns True for an address or a name that only this machine can reach, such as ::1."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
