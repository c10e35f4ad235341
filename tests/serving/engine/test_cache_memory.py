"""How much is set aside for keys and values where nobody says."""

from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

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
