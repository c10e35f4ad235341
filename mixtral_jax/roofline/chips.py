"""Figures of chips, and the topologies that they are sold in. No jax.

A topology is named like `tpu:v5e:2x4`, `gpu:h100:8` or `cpu:8`. Without its last part, `tpu:v5e`
names all sizes, from small to large. Nothing here was measured; whatever is computed from these
figures is an estimate. Sources:

    TPU   Memory bandwidth, peak rates and interconnect are those of Google's pages
          docs.cloud.google.com/tpu/docs/v5e, v5p, v6e and tpu7x. The interconnect is published as
          the sum of all links of a chip in both directions (400, 1200, 800 and 1200 GB/s); a ring
          sends over the two links of one axis of the torus, which is a quarter of that on v5e and
          v6e (two axes) and a sixth on v5p and v7x (three axes). The memory is what the compiler
          names as available when a program does not fit. A chip of v7x is two devices, each with a
          half of the chip's 192 GiB, 7.38 TB/s and 2,307 TFLOP/s; it has no products in int8,
          which are taken to run at the rate of bfloat16.
    GPU   NVIDIA's data sheets of A100 40GB and 80GB SXM, H100 SXM, H200 SXM, HGX B200 and L4, and
          its white paper on the Ada architecture for GeForce RTX 4090: dense rates, without
          sparsity; NVLink in one direction, or PCIe 4.0 x16 where there is none. 1 GiB of the
          memory, which an L4 has less of by its error correction, is left to CUDA, NCCL and cuBLAS.
    CPU   The machine's memory is divided evenly, and the rates are those of a nominal desktop, so
          that plans can be tried out on virtual devices.

The latencies are round numbers of the order that is seen on such networks; no vendor publishes
them.
"""

import math
import os
from dataclasses import dataclass

from mixtral_jax.errors import TopologyError

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Figures of one device.

    Attributes:
        memory: bytes that programs can use.
        bandwidth: bytes a second of that memory.
        bf16: peak operations a second in bfloat16; a multiply-add counts as two.
        int8: peak operations a second in int8.
        fp8: likewise in float8_e4m3fn, summed up in float32; None where it is widened to bfloat16.
        network: bytes a second that one chip sends in a ring of chips.
        latency: seconds that a collective takes from one chip to the next.
        slices: sizes that can be had, from small to large.
        name: the vendor's name.
        device_kinds: names that jax gives devices of this kind.
        devices: devices, as jax counts them, that the vendor's chip has. All figures are of one.
    """

    memory: int
    bandwidth: float
    bf16: float
    int8: float
    network: float
    latency: float
    slices: tuple[str, ...]
    name: str
    device_kinds: tuple[str, ...] = ()
    devices: int = 1
    fp8: float | None = None

    def peak(self, dtype: str) -> float:
        """Peak operations a second in products with weights of this dtype.

        Products in float32 are taken to run at half the rate of bfloat16.
        """
        if dtype == "fp8":
            return self.fp8 or self.bf16
        return self.int8 if dtype == "int8" else self.bf16 / (2 if dtype == "float32" else 1)


_GRIDS = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_SERVERS = ("1", "2", "4", "8")

CHIPS: dict[str, dict[str, Chip]] = {
    "tpu": {
        "v5e": Chip(
            name="TPU v5e",
            device_kinds=("TPU v5 lite", "TPU v5e"),
            memory=int(15.75 * GIB),
            bandwidth=819e9,
            bf16=197e12,
            int8=393e12,
            network=100e9,
            latency=1e-6,
            slices=_GRIDS,
        ),
        "v5p": Chip(
            name="TPU v5p",
            device_kinds=("TPU v5", "TPU v5p"),
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
            device_kinds=("TPU v6 lite", "TPU v6e"),
            memory=int(31.25 * GIB),
            bandwidth=1638e9,
            bf16=918e12,
            int8=1836e12,
            network=200e9,
            latency=1e-6,
            slices=_GRIDS,
        ),
        "v7x": Chip(
            name="TPU v7x (half a chip)",
            device_kinds=("TPU7x",),
            devices=2,
            memory=int(94.75 * GIB),
            bandwidth=3690e9,
            bf16=1153e12,
            int8=1153e12,
            fp8=2307e12,
            network=200e9,
            latency=1e-6,
            slices=("1x1x1", *_CUBES),
        ),
    },
    "gpu": {
        "a100-40": Chip(
            name="A100 40 GB",
            device_kinds=("NVIDIA A100-SXM4-40GB",),
            memory=int(38.5 * GIB),
            bandwidth=1555e9,
            bf16=312e12,
            int8=624e12,
            network=300e9,
            latency=2e-6,
            slices=_SERVERS,
        ),
        "a100-80": Chip(
            name="A100 80 GB",
            device_kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
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
            device_kinds=("NVIDIA H100 80GB HBM3",),
            memory=int(78.1 * GIB),
            bandwidth=3352e9,
            bf16=989e12,
            int8=1979e12,
            fp8=1979e12,
            network=450e9,
            latency=2e-6,
            slices=_SERVERS,
        ),
        "h200": Chip(
            name="H200 141 GB",
            device_kinds=("NVIDIA H200",),
            memory=int(138.8 * GIB),
            bandwidth=4800e9,
            bf16=989e12,
            int8=1979e12,
            fp8=1979e12,
            network=450e9,
            latency=2e-6,
            slices=_SERVERS,
        ),
        "b200": Chip(
            name="B200 180 GB",
            device_kinds=("NVIDIA B200",),
            memory=int(166.6 * GIB),
            bandwidth=8000e9,
            bf16=2250e12,
            int8=4500e12,
            fp8=4500e12,
            network=900e9,
            latency=2e-6,
            slices=_SERVERS,
        ),
        "l4": Chip(
            name="L4 24 GB",
            device_kinds=("NVIDIA L4",),
            memory=int(21.4 * GIB),
            bandwidth=300e9,
            bf16=121e12,
            int8=242e12,
            fp8=242e12,
            network=32e9,
            latency=1e-5,
            slices=_SERVERS,
        ),
        "rtx4090": Chip(
            name="GeForce RTX 4090",
            device_kinds=("NVIDIA GeForce RTX 4090",),
            memory=int(22.9 * GIB),
            bandwidth=1008e9,
            bf16=165e12,
            int8=660e12,
            fp8=330e12,
            network=32e9,
            latency=1e-5,
            slices=("1", "2", "4"),
        ),
    },
}


def chip_of(platform: str, device_kind: str) -> Chip | None:
    """The figures of a device that is there, by jax's names for it; None where it is unknown."""
    chips = CHIPS.get("gpu" if platform in ("cuda", "rocm") else platform, {})
    matching = (chip for chip in chips.values() if device_kind in chip.device_kinds)
    return next(matching, None)


def _cpu(devices: int) -> Chip:
    """One of `devices` virtual devices that share this machine evenly."""
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
    """A number of chips of one kind that are connected with each other.

    Attributes:
        platform: tpu, gpu or cpu.
        kind: the chip's short name, such as v5e or h100; empty for cpu.
        slice: the size: 2x4 for chips in a grid, 8 for chips in one server.
        chip: figures of one of its devices.
    """

    platform: str
    kind: str
    slice: str
    chip: Chip

    @property
    def chips(self) -> int:
        """Number of chips as jax counts devices, of which v7x has two in each."""
        return self.chip.devices * math.prod(int(size) for size in self.slice.split("x"))

    def __str__(self) -> str:
        return ":".join(word for word in (self.platform, self.kind, self.slice) if word)


def topologies(name: str) -> list[Topology]:
    """Topologies that a name stands for: one, or all sizes of a chip from small to large.

    Raises TopologyError for a chip or a slice that does not exist.
    """
    platform, *rest = name.split(":")
    if platform == "cpu":
        count = rest[0] if rest else "8"
        if len(rest) > 1 or not count.isdecimal() or int(count) < 1:
            raise TopologyError(f"topology {name!r}: give cpu:N, such as cpu:8")
        return [Topology(platform="cpu", kind="", slice=count, chip=_cpu(int(count)))]
    if platform not in CHIPS:
        owner = next((known for known, kinds in CHIPS.items() if platform in kinds), None)
        if owner is not None:
            raise TopologyError(f"topology {name!r} names no platform; give {owner}:{name}")
        raise TopologyError(f"topology {name!r} is of no known platform; give {_examples()}")
    kinds = CHIPS[platform]
    if not rest or rest[0] not in kinds:
        kind = rest[0] if rest else "nothing"
        raise TopologyError(
            f"topology {name!r}: {kind} is no known {platform} chip; known are {', '.join(kinds)}"
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
