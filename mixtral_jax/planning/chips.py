"""Chips and the slices that they come in, by the figures that their makers publish. No jax.

A topology is named `tpu:v5e:2x4`, `gpu:h100:8` or `cpu:8`; without its last part (`tpu:v5e`) it
stands for all sizes, from small to large. Sources:

    TPU   cloud.google.com/tpu/docs/v5e, /v5p, /v6e: memory, peak rates, and the bidirectional
          interconnect a chip, of which a ring takes the links of one axis: a half (v5e, v6e) or a
          third (v5p). What of the memory programs can have is what the compiler itself names when
          a program does not fit.
    GPU   NVIDIA's data sheets of A100, H100 and H200 (SXM; dense, without sparsity); NVLink in one
          direction. 1 GiB of the memory is left to CUDA, NCCL and cuBLAS.
    CPU   the machine's memory in equal parts and a nominal desktop's rates: for trying things out.

Nothing of it was measured here; what is computed from it is an estimate.
"""

import math
import os
from dataclasses import dataclass

from mixtral_jax.errors import TopologyError

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device; rates a second."""

    memory: int  # bytes that a program can have
    bandwidth: float  # bytes of that memory
    bf16: float  # floating-point operations, a multiply-add being two
    int8: float
    network: float  # bytes that a ring passes on
    latency: float  # seconds of a collective's step from chip to chip
    slices: tuple[str, ...]  # by their chips
    name: str

    def peak(self, dtype: str) -> float:
        """Operations a second in products of weights of this dtype."""
        return self.int8 if dtype == "int8" else self.bf16 / (2 if dtype == "float32" else 1)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_SERVERS = ("1", "2", "4", "8")

CHIPS: dict[str, dict[str, Chip]] = {
    "tpu": {
        "v5e": Chip(
            name="TPU v5e",
            memory=int(15.75 * GIB),
            bandwidth=819e9,
            bf16=197e12,
            int8=393e12,
            network=100e9,
            latency=1e-6,
            slices=_FLAT,
        ),
        "v5p": Chip(
            name="TPU v5p",
            memory=int(95.74 * GIB),
            bandwidth=2765e9,
            bf16=459e12,
            int8=918e12,
            network=200e9,
            latency=1e-6,
            slices=_CUBES,
        ),
        "v6e": Chip(
            name="TPU v6e",
            memory=int(31.25 * GIB),
            bandwidth=1638e9,
            bf16=918e12,
            int8=1836e12,
            network=200e9,
            latency=1e-6,
            slices=_FLAT,
        ),
    },
    "gpu": {
        "a100-80": Chip(
            name="A100 80 GB",
            memory=int(78.1 * GIB),
            bandwidth=2039e9,
            bf16=312e12,
            int8=624e12,
            network=300e9,
            latency=2e-6,
            slices=_SERVERS,
        ),
        "h100": Chip(
            name="H100 80 GB",
            memory=int(78.1 * GIB),
            bandwidth=3352e9,
            bf16=989e12,
            int8=1979e12,
            network=450e9,
            latency=2e-6,
            slices=_SERVERS,
        ),
        "h200": Chip(
            name="H200 141 GB",
            memory=int(138.8 * GIB),
            bandwidth=4800e9,
            bf16=989e12,
            int8=1979e12,
            network=450e9,
            latency=2e-6,
            slices=_SERVERS,
        ),
    },
}


def _cpu(devices: int) -> Chip:
    """A part of this machine as a virtual device."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Chip(
        name="virtual CPU device",
        memory=memory // devices,
        bandwidth=20e9 / devices,
        bf16=2e11 / devices,
        int8=4e11 / devices,
        network=10e9 / devices,
        latency=1e-5,
        slices=(),
    )


@dataclass(frozen=True, kw_only=True)
class Topology:
    """So many chips of a kind, joined as the slice's name says."""

    platform: str  # tpu, gpu or cpu
    kind: str  # v5e, h100, ...; empty for cpu
    slice: str  # 2x4, 8
    chip: Chip

    @property
    def chips(self) -> int:
        return math.prod(int(part) for part in self.slice.split("x"))

    def __str__(self) -> str:
        return ":".join(part for part in (self.platform, self.kind, self.slice) if part)


def topologies(name: str) -> list[Topology]:
    """What a name stands for: one topology, or all sizes of a chip from small to large.

    Raises TopologyError for a chip or a slice that does not exist.
    """
    platform, *rest = name.split(":")
    if platform == "cpu":
        count = rest[0] if rest else "8"
        if len(rest) > 1 or not count.isdecimal() or int(count) < 1:
            raise TopologyError(f"topology {name!r}: give cpu:N, such as cpu:8")
        return [Topology(platform="cpu", kind="", slice=count, chip=_cpu(int(count)))]
    if platform not in CHIPS:
        raise TopologyError(f"topology {name!r} is of no known platform; give {_examples()}")
    kinds = CHIPS[platform]
    if not rest or rest[0] not in kinds:
        what = rest[0] if rest else "nothing"
        raise TopologyError(
            f"topology {name!r}: {what} is no known {platform} chip; known are {', '.join(kinds)}"
        )
    chip = kinds[rest[0]]
    sizes = rest[1:] or chip.slices
    if len(rest) > 2 or sizes[0] not in chip.slices:
        raise TopologyError(
            f"topology {name!r}: there is no such slice of {rest[0]}; there are "
            f"{', '.join(chip.slices)}"
        )
    return [Topology(platform=platform, kind=rest[0], slice=size, chip=chip) for size in sizes]


def _examples() -> str:
    return "tpu:v5e:2x4, tpu:v5p:2x2x1, tpu:v6e:2x4, gpu:h100:8, gpu:a100-80:4 or cpu:8"
