"""The forms of the CPU kernels: their files, compiled for one instruction set each.

`choose` names the form that a machine runs best, by what machine.cc says of the processor and its
operating system. MIXTRAL_JAX_ISA=NAME in the environment forces one.
"""

import os
import platform
from collections.abc import Collection
from dataclasses import dataclass

from mixtral_jax.errors import ConfigError


@dataclass(frozen=True)
class Form:
    """A name of MIXTRAL_JAX_ISA, with what the compiler is told and what the machine must have."""

    name: str
    flags: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()  # words of machine.cc
    vector_bits: int = 128  # the width of the registers that products and attention use

    @property
    def definitions(self) -> tuple[str, ...]:
        """The macros of form.h, as the compiler takes them."""
        return (f"-DMIXTRAL_JAX_FORM={self.name}", f"-DMIXTRAL_JAX_VECTOR_BITS={self.vector_bits}")


_V3 = ("-march=x86-64-v3",)
_V4 = ("-march=x86-64-v4", "-mavx512vnni")
# By kind of processor, the fastest form first. The form of 256-bit AVX-512 runs on no machine that
# the one of 512 bits does not run on: it is the code of `avxvnni`, for processors that lower their
# clock when registers are wide.
FORMS: dict[str, tuple[Form, ...]] = {
    "x86_64": (
        Form(
            "avx512bf16",
            (*_V4, "-mavx512bf16", "-mprefer-vector-width=512"),
            frozenset({"v4", "avx512vnni", "avx512bf16"}),
            512,
        ),
        Form(
            "avx512vnni",
            (*_V4, "-mprefer-vector-width=512"),
            frozenset({"v4", "avx512vnni"}),
            512,
        ),
        Form(
            "avx512vnni256",
            (*_V4, "-mprefer-vector-width=256"),
            frozenset({"v4", "avx512vnni"}),
            256,
        ),
        Form("avxvnni", (*_V3, "-mavxvnni"), frozenset({"v3", "avxvnni"}), 256),
        Form("avx2", _V3, frozenset({"v3"}), 256),
        Form("portable"),
    ),
    "aarch64": (
        Form("i8mm", ("-march=armv8.2-a+dotprod+i8mm",), frozenset({"dotprod", "i8mm"})),
        Form("dotprod", ("-march=armv8.2-a+dotprod",), frozenset({"dotprod"})),
        Form("neon", ("-march=armv8-a",)),
    ),
}
_OTHER_NAMES = {"AMD64": "x86_64", "arm64": "aarch64"}


def forms_of(machine: str | None = None) -> tuple[Form, ...]:
    """The forms of a kind of processor, the fastest first; of this one unless `machine` says."""
    machine = machine or platform.machine()
    return FORMS.get(_OTHER_NAMES.get(machine, machine), (Form("portable"),))


def supported(features: Collection[str], machine: str | None = None) -> list[Form]:
    """The forms that run on a machine with these features, the fastest first."""
    return [form for form in forms_of(machine) if form.needs <= set(features)]


def choose(features: Collection[str], machine: str | None = None) -> list[Form]:
    """The forms to try, the fastest first: one alone where MIXTRAL_JAX_ISA names it.

    Raises ConfigError where that is no form of this kind of processor, or none that runs here.
    """
    runs = supported(features, machine)
    wanted = os.environ.get("MIXTRAL_JAX_ISA")
    if not wanted:
        return runs
    if chosen := [form for form in runs if form.name == wanted]:
        return chosen
    known = any(form.name == wanted for form in forms_of(machine))
    raise ConfigError(
        f"MIXTRAL_JAX_ISA={wanted} "
        + ("needs a processor with more than this one has" if known else "is no instruction set")
        + f"; this machine runs {', '.join(form.name for form in runs)}"
    )
