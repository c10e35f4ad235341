"""How much memory keys and values may take where nobody says."""

from pathlib import Path

import jax

_MEMINFO = Path("/proc/meminfo")
_OF_DEVICE = 0.9  # the rest is for what a step computes in between
_OF_HOST = 0.5  # a CPU shares its memory with everything else
_MOST_OF_HOST = 2 << 30  # a CPU is slow before so many tokens are in flight
_UNKNOWN = 512 << 20
_LEAST = 64 << 20


def cache_bytes(weights: int) -> int:
    """Bytes on each device for keys and values, beside weights of so many bytes on each, which are
    not loaded yet.

    An accelerator is asked what it has left, a CPU's system what it has available: of that all
    virtual devices get the same part.
    """
    devices = jax.local_devices()
    device = devices[0]
    if device.platform == "cpu":
        available = _available()
        if available is None:
            return _UNKNOWN
        left = int((available - weights * len(devices)) * _OF_HOST)
        return max(_LEAST, min(_MOST_OF_HOST, left) // len(devices))
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return _UNKNOWN
    left = stats["bytes_limit"] - stats.get("bytes_in_use", 0) - weights
    return max(_LEAST, int(left * _OF_DEVICE))


def _available() -> int | None:
    """Bytes that programs can still have without swapping; None where the system does not say."""
    lines = _MEMINFO.read_text().splitlines() if _MEMINFO.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) << 10 if found else None
