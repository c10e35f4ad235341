"""Devices that jax sees, told before work begins, and those that it should see and does not.

A TPU that another process holds makes jax fall back to the CPU with one line of warning
(github.com/jax-ml/jax/issues/10192), and a notebook then runs a thousand times slower, or takes the
wrong device's results for right. `show_devices` stops there.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from mixtral_jax.errors import TopologyError

# Files that the drivers make, by the accelerator whose they are.
_FILES = {"TPU": ("dev/accel*", "dev/vfio/[0-9]*"), "GPU": ("dev/nvidia[0-9]*", "dev/kfd")}


def show_devices() -> None:
    """Prints the platform, the number of devices, their kind and their memory.

    Raises TopologyError where the machine has a TPU or GPU that jax does not use, unless
    JAX_PLATFORMS asks for the CPU.
    """
    import jax

    devices = jax.devices()
    check_seen(devices[0].platform)
    stats = jax.local_devices()[0].memory_stats() or {}
    memory = f", {stats['bytes_limit'] / 2**30:.1f} GiB each" if "bytes_limit" in stats else ""
    number = "1 device" if len(devices) == 1 else f"{len(devices)} devices"
    print(f"{devices[0].platform}: {number} ({devices[0].device_kind}){memory}")


def check_seen(
    platform: str, environment: Mapping[str, str] = os.environ, root: Path = Path("/")
) -> None:
    """Raises TopologyError where jax uses the CPU although an accelerator is there.

    Args:
        platform: what jax uses, such as cpu or tpu.
        environment: of this process; JAX_PLATFORMS=cpu says that the CPU is wanted.
        root: the folder that has `dev`.
    """
    if platform != "cpu" or environment.get("JAX_PLATFORMS", "").strip() == "cpu":
        return
    seen = accelerator(environment, root)
    if seen is not None:
        kind, sign = seen
        raise TopologyError(
            f"this machine has a {kind} ({sign}), but jax computes on the CPU: another process "
            f"holds the {kind}, or jax was installed without support for it. End the other process "
            "(restart other notebooks' kernels) and restart this one, or install "
            f"'mixtral-jax[{'tpu' if kind == 'TPU' else 'cuda'}]'; JAX_PLATFORMS=cpu asks for the "
            "CPU on purpose"
        )


def accelerator(environment: Mapping[str, str], root: Path) -> tuple[str, str] | None:
    """The kind of accelerator that the machine has, and the sign of it; None for neither."""
    if environment.get("TPU_ACCELERATOR_TYPE"):
        return "TPU", f"TPU_ACCELERATOR_TYPE={environment['TPU_ACCELERATOR_TYPE']}"
    for kind, patterns in _FILES.items():
        for pattern in patterns:
            for file in sorted(root.glob(pattern)):
                return kind, str(file)
    return None
