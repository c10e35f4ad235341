"""Memory of devices: what keys and values get where the operator does not say, and what is held."""

import math
from collections.abc import Iterator
from pathlib import Path

import jax
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mixtral_jax.model.adapter_stack import slot_bytes
from mixtral_jax.model.transformer import Transformer, held_bytes
from mixtral_jax.roofline.page_memory import page_memory
from mixtral_jax.step.buckets import Steps

_MEMINFO = Path("/proc/meminfo")
_OF_HOST = 0.5  # a CPU shares its memory with everything else
_LARGEST_OF_HOST = 2 << 30  # with more tokens in flight a CPU is too slow in any case
_UNKNOWN = 512 << 20
_LEAST = 64 << 20
# Kinds of what a device's allocator says, and its own names for them.
_OF_ALLOCATOR = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}


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
    held = stats.get("bytes_in_use", 0) + weights
    return max(_LEAST, page_memory(stats["bytes_limit"], held))


def _available() -> int | None:
    """Returns the bytes that programs can still have without swapping; None if unknown."""
    lines = _MEMINFO.read_text(encoding="utf-8").splitlines() if _MEMINFO.exists() else []
    kibibytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kibibytes[0]) << 10 if kibibytes else None


class DeviceMemory(Collector):
    """Bytes on the fullest device of this process, by kind.

    `weights`, `pages` and `adapters` are those of the arrays, and `draft` the weights and pages of
    a draft model; `programs` is the code of all that are compiled, and `temporaries` what the one
    with the most of them takes while it runs, as the compiler says. `in_use`, `peak` and `limit`
    are those of the device's allocator, where it has one that tells; a CPU has none.

    Args:
        model: the parameters.
        steps: all programs of its engine.
        registry: of the process.
        draft: weights and programs of a draft model; None without one.
    """

    def __init__(
        self,
        model: Transformer,
        steps: Steps,
        registry: CollectorRegistry,
        draft: tuple[Transformer, Steps] | None = None,
    ) -> None:
        self._all_steps = [steps]
        self._arrays = {"weights": held_bytes(model), "pages": _page_bytes(model, steps)}
        if draft is not None:
            self._all_steps.append(draft[1])
            self._arrays["draft"] = held_bytes(draft[0]) + _page_bytes(*draft)
        if steps.adapters is not None:
            sizes = steps.adapters.sizes
            slot = slot_bytes(model.config, model.placement, sizes)
            self._arrays["adapters"] = sizes.slots * slot
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yields the bytes by `kind`."""
        family = GaugeMetricFamily(
            "mixtral_device_memory_bytes",
            "Bytes on the fullest device of this process, by kind.",
            labels=("kind",),
        )
        analyses = [program.memory_analysis() for s in self._all_steps for program in s.programs]
        known = [analysis for analysis in analyses if analysis is not None]
        code = sum(analysis.generated_code_size_in_bytes for analysis in known)
        temporaries = max((analysis.temp_size_in_bytes for analysis in known), default=0)
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        allocated = {
            kind: max(values)
            for kind, name in _OF_ALLOCATOR.items()
            if (values := [known[name] for known in stats if name in known])
        }
        kinds = {**self._arrays, "programs": code, "temporaries": temporaries, **allocated}
        for kind, value in kinds.items():
            family.add_metric([kind], value)
        yield family


def _page_bytes(model: Transformer, steps: Steps) -> int:
    """Returns the bytes of all layers' pages on each device."""
    pages = steps.pages
    shape = pages.shape if pages.sharding is None else pages.sharding.shard_shape(pages.shape)
    return model.config.num_layers * math.prod(shape) * pages.dtype.itemsize
