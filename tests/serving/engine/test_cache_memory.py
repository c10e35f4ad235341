"""How much is set aside for keys and values where nobody says."""

from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from prometheus_client import CollectorRegistry

import mixtral_jax
from mixtral_jax.model.adapter_stack import StackSizes, slot_bytes
from mixtral_jax.model.transformer import named_parameters
from mixtral_jax.step.buckets import compile_buckets
from mixtral_jax.step.inputs import StepSizes
from serving.engine import cache_memory as memory

GIB = 1 << 30


@pytest.mark.parametrize(
    ("available", "weights", "expected"),
    [(20 * GIB, GIB, 2 * GIB), (3 * GIB, GIB, GIB), (GIB, 2 * GIB, 64 << 20)],
)
def test_half_of_what_the_weights_leave_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, available: int, weights: int, expected: int
) -> None:
    said = tmp_path / "meminfo"
    said.write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {available >> 10} kB\nCached: 7 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", said)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    assert memory.cache_bytes(weights) == expected


def test_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "nothing")
    assert memory.cache_bytes(GIB) == 512 << 20


@pytest.mark.parametrize(
    ("stats", "expected"),
    [
        ({"bytes_limit": 12 * GIB, "bytes_in_use": GIB}, 9 * GIB),
        ({"bytes_limit": GIB}, 64 << 20),
        ({}, 512 << 20),
        (None, 512 << 20),
    ],
)
def test_most_of_what_the_weights_leave_of_an_accelerator(
    monkeypatch: pytest.MonkeyPatch, stats: dict[str, int] | None, expected: int
) -> None:
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert memory.cache_bytes(GIB) == expected


def kinds(registry: CollectorRegistry) -> dict[str, float]:
    (family,) = registry.collect()
    assert family.name == "mixtral_device_memory_bytes"
    return {sample.labels["kind"]: sample.value for sample in family.samples}


def test_what_a_device_holds_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two devices, with half of the heads and all of the pages of each layer."""
    model, _ = mixtral_jax.load("tiny-random", mesh="tensor=2")
    stacks = StackSizes(slots=3, rank=4, targets=("q", "o"))
    sizes = StepSizes(num_pages=6, page_size=16, max_sequences=2, max_context=64)
    steps = compile_buckets(model, sizes, {8: 2}, has_masks=False, adapters=stacks)
    registry = CollectorRegistry()
    memory.DeviceMemory(model, steps, registry)
    held = kinds(registry)
    # Of a CPU no allocator tells anything.
    assert set(held) == {"weights", "pages", "adapters", "programs", "temporaries"}
    device = jax.devices()[0]
    arrays = [variable.get_value() for variable in named_parameters(model).values()]
    shards = [part for array in arrays for part in array.addressable_shards]
    assert held["weights"] == sum(part.data.nbytes for part in shards if part.device == device)
    # 2 layers, 6 pages of 16 positions, keys and values of 1 of 2 heads of size 16, in float32
    assert held["pages"] == 2 * 6 * 16 * 2 * 1 * 16 * 4
    assert held["adapters"] == 3 * slot_bytes(model.config, model.placement, stacks)
    block = steps.buckets[8].blocks[0].memory_analysis()
    assert held["temporaries"] >= block.temp_size_in_bytes > 0
    assert held["programs"] >= block.generated_code_size_in_bytes

    said = [{"bytes_in_use": 5, "bytes_limit": 9}, {"bytes_in_use": 7, "bytes_limit": 9}, None]
    devices = [SimpleNamespace(memory_stats=lambda stats=stats: stats) for stats in said]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    told = kinds(registry)
    assert (told["in_use"], told["limit"], "peak" in told) == (7, 9, False)
