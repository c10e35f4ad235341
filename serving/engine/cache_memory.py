"""Memory for keys and values, where the operator does not set it."""

from pathlib import Path

import jax

_MEMINFO = Path("/proc/meminfo")
_OF_DEVICE = 0.9  # the rest is for intermediate results of a step
_OF_HOST = 0.5  # a CPU shares its memory with everything else
_LARGEST_OF_HOST = 2 << 30  # with more tokens in flight a CPU is too slow in any case
_UNKNOWN = 512 << 20
_LEAST = 64 << 20


def cache_bytes(weights: int) -> int:
    """Returns the bytes on each device for keys and values.

    `weights` is the bytes on each device of weights that are not loaded yet. An accelerator says
    how much memory is free, and a CPU's system how much is available, of which all virtual devices
    get the same part.
    """
    devices = jax.local_devices()
    device = devices[0]
    if device.platform == "cpu":
        available = _available()
        if available is None:
            return _UNKNOWN
        free = int((available - weights * len(devices)) * _OF_HOST)
        return max(_LEAST, min(_LARGEST_OF_HOST, free) // len(devices))
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return _UNKNOWN
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0) - weights
    return max(_LEAST, int(free * _OF_DEVICE))


def _available() -> int | None:
    """Returns the bytes that programs can still have without swapping; None if unknown."""
    lines = _MEMINFO.read_text(encoding="utf-8").splitlines() if _MEMINFO.exists() else []
    kibibytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kibibytes[0]) << 10 if kibibytes else None
