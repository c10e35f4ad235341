"""Absent devices: chips that compilers can compile for although nothing can run on them here.

The compilers are optional packages: `libtpu` for TPUs, jax's CUDA plugins for GPUs. They read
variables of the environment when jax starts, so programs are compiled in a process of its own with
the variables of `environment` (see compiler.py).
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mixtral_jax.errors import TopologyError
from mixtral_jax.roofline.chips import Topology

# Figures of a GPU from which the compiler chooses tiles, registers and instructions: the compute
# capability, streaming multiprocessors, bytes of shared memory of each, GHz, and bytes of level 2
# cache. They are those of NVIDIA's CUDA programming guide and data sheets.
_GPUS: dict[str, dict[str, Any]] = {
    "a100-80": {
        "capability": (8, 0),
        "cores": 108,
        "shared": 167936,
        "clock": 1.41,
        "l2": 40 << 20,
    },
    "h100": {"capability": (9, 0), "cores": 132, "shared": 233472, "clock": 1.98, "l2": 50 << 20},
    "h200": {"capability": (9, 0), "cores": 132, "shared": 233472, "clock": 1.98, "l2": 50 << 20},
    "b200": {"capability": (10, 0), "cores": 148, "shared": 233472, "clock": 1.97, "l2": 126 << 20},
    "l4": {"capability": (8, 9), "cores": 58, "shared": 102400, "clock": 2.04, "l2": 48 << 20},
    "rtx4090": {
        "capability": (8, 9),
        "cores": 128,
        "shared": 102400,
        "clock": 2.52,
        "l2": 72 << 20,
    },
}
# The A100 of 40 GB is the same chip with less memory.
_GPUS["a100-40"] = _GPUS["a100-80"]
# Names of chips of libtpu that are not ours.
_NAMES = {"v7x": "tpu7x"}
# Names of the cards as CUDA says them: jax 0.12 looks a card's figures up by its name.
_CARDS = {
    "a100-40": "NVIDIA A100-SXM4-40GB",
    "a100-80": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
    "l4": "NVIDIA L4",
    "rtx4090": "NVIDIA GeForce RTX 4090",
}
_COMPILERS = {"tpu": ("libtpu",), "gpu": ("jax_cuda13_plugin", "jax_cuda12_plugin")}


def installed(platform: str) -> bool:
    """True if a compiler for this platform (tpu, gpu or cpu) is installed."""
    names = _COMPILERS.get(platform)
    return names is None or any(importlib.util.find_spec(name) is not None for name in names)


def environment(topology: Topology, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables for the process that compiles for a topology.

    They are the `given` ones, by default this process's, without those about its own devices.
    """
    kept = {
        name: value
        for name, value in (os.environ if given is None else given).items()
        if not name.startswith(("JAX_", "XLA_", "TPU_", "LIBTPU_"))
    }
    kept["JAX_PLATFORMS"] = "cpu"
    if topology.platform == "cpu":
        return kept | {"JAX_NUM_CPU_DEVICES": topology.slice}
    # Kernels for CPU are not needed, and compiling them takes time.
    kept["MIXTRAL_JAX_NATIVE"] = "0"
    if topology.platform == "tpu":
        kept |= {
            "TPU_SKIP_MDS_QUERY": "1",  # no query of Google Cloud's metadata service
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is in use, so processes may overlap
        }
    return kept


def absent_devices(topology: Topology) -> Sequence[jax.Device]:
    """The topology's devices, for meshes whose programs are compiled and never run.

    Raises TopologyError if the compiler does not know the topology.
    """
    if topology.platform == "cpu":
        return jax.devices("cpu")[: topology.chips]
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    name = ""
    if topology.platform == "tpu":
        name = f"{_NAMES.get(topology.kind, topology.kind)}:{topology.slice}"
        if topology.chips == topology.chip.devices:
            options["chips_per_host_bounds"] = (1, 1, 1)
    else:
        options["target_config"] = _target_config(topology)
        options["topology"] = f"1x1x{topology.chips}"
    platform = "cuda" if topology.platform == "gpu" else topology.platform
    try:
        description = topologies.get_topology_desc(platform=platform, topology_name=name, **options)
    except Exception as error:
        raise TopologyError(f"the compiler does not know {topology}: {error}") from error
    return list(description.devices)


def target_devices(topology: Topology) -> Sequence[jax.Device]:
    """`absent_devices` for a process that does nothing but compile for them.

    The first becomes the process's default device, whose compute capability Mosaic GPU asks for;
    nothing can be computed on it. Raises TopologyError as `absent_devices` does.
    """
    devices = absent_devices(topology)
    if topology.platform == "gpu":
        jax.config.update("jax_default_device", devices[0])
    return devices


def _target_config(topology: Topology) -> str:
    """Text of XLA's GpuTargetConfigProto for one chip of the topology."""
    gpu = _GPUS[topology.kind]
    major, minor = gpu["capability"]
    facts = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": gpu["shared"],
        "shared_memory_per_block_optin": gpu["shared"] - 1024,
        "threads_per_core_limit": 1536 if minor else 2048,
        "core_count": gpu["cores"],
        "fpus_per_core": 64 if (major, minor) == (8, 0) else 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(topology.chip.bandwidth),
        "l2_cache_size": gpu["l2"],
        "clock_rate_ghz": gpu["clock"],
        "device_memory_size": topology.chip.memory + (1 << 30),
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "device_address_bits": 64,
    }
    lines = [f"{name}: {value}" for name, value in facts.items()]
    lines.append(f"cuda_compute_capability {{ major: {major} minor: {minor} }}")
    lines.append('device_vendor: "NVIDIA Corporation"')
    info = "\n".join(lines)
    versions = "dnn_version_info { major: 9 minor: 10 patch: 0 }"
    described = f'device_description_str: "{_CARDS[topology.kind]}"'
    return f'gpu_device_info {{\n{info}\n}}\nplatform_name: "CUDA"\n{versions}\n{described}\n'
