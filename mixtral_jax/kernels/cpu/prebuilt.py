"""Builds the library of a wheel: every form of a kind of processor in one file.

    python -m mixtral_jax.kernels.cpu.prebuilt x86_64-linux build/kernels/x86_64-linux.so

Only `make dist` and tests run it. The compiler is the one of the package ziglang, which has the
headers of old C libraries and compiles for processors and systems that are not here.

**No code may pass from one form into another.** Inline functions and templates, those of std:: too,
stand in every object file that uses them, and a linker keeps one of them for all: code for AVX-512
would then run in the form for AVX2. So each file of a form is compiled to assembly, in which every
symbol but the form's own handlers is made local before it is assembled.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import jax

from mixtral_jax.kernels.cpu.build import digest
from mixtral_jax.kernels.cpu.forms import Form, forms_of
from mixtral_jax.paths import cache_folder

_FOLDER = Path(__file__).parent
# Files that are the same in every form, compiled for any processor of their kind.
SHARED = ("machine.cc", "order.cc", "worker_pool.cc")
# Name -> what zig calls it. 2.17 is the version of the C library that manylinux2014 has.
TARGETS = {
    "x86_64-linux": "x86_64-linux-gnu.2.17",
    "aarch64-linux": "aarch64-linux-gnu.2.17",
}
_COMPILER = (sys.executable, "-m", "ziglang", "c++")
_FLAGS = (
    *("-O3", "-g0", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *(
        "-fno-sanitize=all",
        "-Wall",
        "-Wextra",
        "-Wshadow",
        "-Werror",
        "-Wno-psabi",
        "-Wno-unused-command-line-argument",
    ),
)


def build(target: str) -> Path:
    """Compiles and links all forms for a target, one of TARGETS; kept in the user's cache."""
    machine = target.partition("-")[0]
    base = [*_COMPILER, "-target", TARGETS[target], *_FLAGS, "-isystem", jax.ffi.include_dir()]
    words = [version("ziglang"), Path(__file__).read_text(encoding="utf-8"), *base[3:]]
    words += [word for form in forms_of(machine) for word in (*form.flags, *form.definitions)]
    folder = cache_folder() / "native"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{digest(words)}.so"
    with (folder / f"{target}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as place:
                made = _link(base, machine, Path(place))
                with_symbols(made).rename(with_symbols(library))
                made.rename(library)
    return library


def with_symbols(library: Path) -> Path:
    """The same library with the names of all functions, for those who look at its code."""
    return library.with_suffix(".symbols")


def _link(base: list[str], machine: str, folder: Path) -> Path:
    of_forms = [file for file in sorted(_FOLDER.glob("*.cc")) if file.name not in SHARED]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        jobs = [
            threads.submit(_shared, base, _FOLDER / name, folder / f"{name}.o") for name in SHARED
        ]
        jobs += [
            threads.submit(_of_a_form, base, form, file, folder / f"{form.name}-{file.stem}.s")
            for form in forms_of(machine)
            for file in of_forms
        ]
        parts = [job.result() for job in jobs]
    exports, library = folder / "exports", folder / "kernels.so"
    exports.write_text("{ global: mixtral_jax_*; local: *; };\n", encoding="utf-8")
    link = [*base[:6], "-O3", "-shared", f"-Wl,--version-script={exports}", *parts]
    _run([*link, "-o", str(with_symbols(library))])
    _run([*link, "-Wl,-S", "-o", str(library)])
    return library


def _shared(base: list[str], source: Path, made: Path) -> str:
    _run([*base, "-c", str(source), "-o", str(made)])
    return str(made)


def _of_a_form(base: list[str], form: Form, source: Path, made: Path) -> str:
    _run([*base, *_flags_of(form), *form.definitions, "-S", str(source), "-o", str(made)])
    text = made.read_text(encoding="utf-8")
    # Local symbols stand behind the name of their file: a test asks it for their form.
    text = re.sub(r'^\s*\.file\s+"[^"]+"$', f'\t.file "{form.name}"', text, count=1, flags=re.M)
    made.write_text(localized(text, f"mixtral_jax_\\w+_{form.name}"), encoding="utf-8")
    return str(made)


def _flags_of(form: Form) -> list[str]:
    """The form's flags in the words of zig, which names processors in a way of its own."""
    words = [flag.replace("-march=", "-mcpu=") for flag in form.flags]
    words = [re.sub(r"armv8[.2]*-a", "generic", word) for word in words]
    return [re.sub(r"x86-64-(v\d)", r"x86_64_\1", word) for word in words]


_GROUPED = re.compile(
    r'^(\s*\.section\s+[^,]+,)"(\w*)G(\w*)",([@%]\w+)((?:,\d+)?),[^,]+,comdat', re.M
)
_DEFINED = re.compile(r"^(\"[^\"]+\"|[\w.$]+):|^\s*\.set\s+([\w.$]+),", re.M)
_BINDING = re.compile(r"^\s*\.(?:weak|globl|hidden|protected)\s+(\"[^\"]+\"|[\w.$]+).*\n", re.M)


def localized(assembly: str, exported: str) -> str:
    """An ELF assembly file in which every symbol that it defines is local to it.

    Args:
        assembly: A compiler's output.
        exported: A regular expression of the names that stay global.
    """
    defined = {a or b for a, b in _DEFINED.findall(assembly)}
    keep = re.compile(exported)

    def binding(line: re.Match[str]) -> str:
        own = line[1] in defined and not keep.fullmatch(line[1])
        return "" if own else line[0]

    assembly = _GROUPED.sub(r'\1"\2\3",\4\5', assembly)
    return _BINDING.sub(binding, assembly)


def _run(command: Iterable[str]) -> None:
    done = subprocess.run([*command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    _destination = Path(sys.argv[2])
    _destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(build(sys.argv[1]), _destination)
