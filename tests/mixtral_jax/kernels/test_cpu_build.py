"""The C++ of the CPU kernels compiles without a warning and runs clean under the sanitizers."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_jax.kernels.cpu import build
from mixtral_jax.kernels.cpu.forms import FORMS, Form, forms_of, supported

COMPILER = shutil.which("g++")
HERE = Path(__file__).parent
CODE = Path(build.__file__).parent
WARNINGS = ("-Wall", "-Wextra", "-Wshadow")
# By kind of processor, a compiler for it and what runs its programs elsewhere.
CROSS_COMPILERS = {"aarch64": ("aarch64-linux-gnu-g++", "qemu-aarch64")}
# The least of QEMU's processors that has what a form needs: no form may have another's code.
EMULATED = {"neon": "cortex-a72", "dotprod": "cortex-a76", "i8mm": "max"}
EVERY_FORM = [(machine, form) for machine in FORMS for form in FORMS[machine]]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")


def output_of(command: list[str], **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.soak  # the whole library is compiled, as for its users
def test_the_library_compiles_without_a_warning(tmp_path: Path) -> None:
    form = forms_of()[0]  # the other compiler, that of wheels, warns of all forms
    command = [*build.build_command(str(COMPILER), form), "-o", str(tmp_path / "kernels.so")]
    assert set(WARNINGS) <= set(command)
    assert "-w" not in command
    output_of([*command, "-Werror"])


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_worker_pool_runs_every_task_once(tmp_path: Path, sanitizer: str) -> None:
    """10,000 small jobs of two threads; a race or a bad access ends the program."""
    program = tmp_path / "driver"
    sources = [str(CODE / "worker_pool.cc"), str(HERE / "worker_pool_driver.cc")]
    flags = ["-std=c++17", "-O1", "-g", f"-I{CODE}", "-pthread", "-Werror", *WARNINGS]
    checks = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    output_of([str(COMPILER), *flags, *checks, *sources, "-o", str(program)])
    assert output_of([str(program)]) == "0 jobs were wrong\n"


@pytest.mark.parametrize(
    ("machine", "form"), EVERY_FORM, ids=[f"{machine}-{form.name}" for machine, form in EVERY_FORM]
)
def test_products_of_every_form_are_exact(tmp_path: Path, machine: str, form: Form) -> None:
    """Few rows and many, sizes that fill no vector and several panels, sums as large as they get.

    A form of another kind of processor runs under an emulator; one that this processor lacks is
    compiled only.
    """
    is_here = platform.machine() == machine
    compiler, runner = (str(COMPILER), []) if is_here else cross_compiler(machine, form)
    program = tmp_path / "driver"
    sources = [str(CODE / "worker_pool.cc"), str(HERE / "int8_products_driver.cc")]
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wno-psabi", f"-I{CODE}", "-pthread"]
    flags += [*form.flags, *form.definitions, *([] if is_here else ["-static"])]
    output_of([compiler, *flags, *WARNINGS, "-Werror", *sources, "-o", str(program)])
    if not is_here or form in supported(build._features(str(COMPILER))):
        assert output_of([*runner, str(program)]) == "0 results differ\n"


def cross_compiler(machine: str, form: Form) -> tuple[str, list[str]]:
    """A compiler for another kind of processor, and what runs its programs; skips without them."""
    compiler, emulator = (
        shutil.which(name) or "" for name in CROSS_COMPILERS.get(machine, ("", ""))
    )
    if not compiler or not emulator:
        pytest.skip(f"no compiler or no emulator for {machine} is installed")
    return compiler, [emulator, "-cpu", EMULATED[form.name]]


@pytest.mark.soak  # minutes: every kernel runs many times slower
@pytest.mark.timeout(3000)
def test_the_kernels_run_clean_under_the_sanitizers(tmp_path: Path) -> None:
    """The tests of two modules with a library that ends at a bad access or undefined behaviour."""
    compiler = tmp_path / "sanitizing-g++"
    compiler.write_text(
        f'#!/bin/sh\nexec {COMPILER} "$@" -O1 -g -fno-omit-frame-pointer '
        "-fsanitize=address,undefined -fno-sanitize-recover=all\n",
        encoding="utf-8",
    )
    compiler.chmod(0o755)
    # The sanitizer must be loaded before the interpreter's libraries, and with it the library
    # whose exceptions it watches.
    libraries = [
        output_of([str(COMPILER), f"-print-file-name={name}"]).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    modules = [str(HERE / name) for name in ("test_cpu.py", "test_cpu_groups.py")]
    report = output_of(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *modules],
        CXX=str(compiler),
        MIXTRAL_JAX_CACHE=str(tmp_path / "cache"),
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",  # the interpreter frees nothing at its end
    )
    assert " passed" in report
    assert "skipped" not in report
    libraries_here = (tmp_path / "cache" / "native").glob("*.so")
    assert any(b"__asan_report_load" in library.read_bytes() for library in libraries_here)
