"""Attention of the CPU kernels has the same bits in registers of every width, on any threads."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from mixtral_jax.kernels.cpu import build
from mixtral_jax.kernels.cpu.forms import FORMS, Form, supported

HERE = Path(__file__).parent
CODE = Path(build.__file__).parent
COMPILER = shutil.which("g++")
ARM_COMPILER, ARM_EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")


def forms_here(folder: Path) -> list[Form]:
    """The forms that run on this machine, by what machine.cc says of it."""
    library = folder / "machine.so"
    command = [str(COMPILER), "-std=c++17", "-shared", "-fPIC", f"-I{CODE}", "-o", str(library)]
    subprocess.run([*command, str(CODE / "machine.cc")], check=True, timeout=200)
    features = ctypes.CDLL(str(library)).mixtral_jax_features
    features.restype = ctypes.c_char_p
    return supported(features().decode().split())


def digest(form: Form, folder: Path, compiler: str | None, *emulator: str) -> str:
    """What attention_driver.cc prints in a form: a number of all bits of its results."""
    program = folder / f"driver-{form.name}"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wno-psabi", "-w", f"-I{CODE}"]
    sources = [str(CODE / "worker_pool.cc"), str(HERE / "attention_driver.cc")]
    command = [str(compiler), *flags, *form.flags, *form.definitions, "-pthread"]
    command += [*sources, "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    done = subprocess.run(
        [*emulator, str(program)], check=True, capture_output=True, text=True, timeout=200
    )
    differing, number = done.stdout.splitlines()
    assert differing == "0 results differ"
    return number


def test_every_width_and_number_of_threads_has_the_same_bits(tmp_path: Path) -> None:
    """Forms with a fused multiply-add; the portable form of x86 rounds twice, but once for all."""
    by_width = {form.vector_bits: form for form in forms_here(tmp_path)}
    numbers = {form.name: digest(form, tmp_path, COMPILER) for form in by_width.values()}
    numbers.pop("portable", None)
    assert len(set(numbers.values())) <= 1, numbers


@pytest.mark.slow  # half a minute under the emulator
@pytest.mark.skipif(not (ARM_COMPILER and ARM_EMULATOR), reason="no compiler or emulator of ARM")
def test_arm_has_the_bits_of_x86(tmp_path: Path) -> None:
    avx2 = next((form for form in forms_here(tmp_path) if form.name == "avx2"), None)
    if avx2 is None:
        pytest.skip("this machine has no fused multiply-add")
    emulator = (str(ARM_EMULATOR), "-L", "/usr/aarch64-linux-gnu")
    neon = digest(FORMS["aarch64"][-1], tmp_path, ARM_COMPILER, *emulator)
    assert neon == digest(avx2, tmp_path, COMPILER)
