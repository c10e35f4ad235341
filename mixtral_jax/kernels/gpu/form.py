"""The form of the kernels that a card gets: chosen by jax's version and the compute capability.

mosaic   Mosaic GPU, from jax 0.12 on: one source for every card from 8.0 on
triton   Pallas-Triton, which JAX deprecated in 0.11 and will remove: before 0.12, and AMD
xla      what XLA makes by itself: older cards, when Triton's form is gone
"""

from typing import Literal

import jax

Form = Literal["mosaic", "triton", "xla"]
Capability = tuple[int, int]

_MMA: Capability = (8, 0)  # has products of bfloat16 and int8 on registers
_FP8: Capability = (8, 9)  # converts float8_e4m3fn


def capability_of(device: jax.Device) -> Capability | None:
    """The compute capability of an NVIDIA card, present or absent; None for any other device."""
    text = getattr(device, "compute_capability", None)
    if not isinstance(text, str) or text.startswith("gfx"):
        return None
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def form_for(capability: Capability | None) -> Form:
    """The form for a card; for None, which is a card of AMD's, Triton's."""
    if capability is None or jax.__version_info__ < (0, 12):
        return "triton"
    return "mosaic" if capability >= _MMA else "xla"


def takes_fp8(capability: Capability | None) -> bool:
    """Says whether a card's kernels read float8_e4m3fn."""
    return capability is not None and capability >= _FP8
