"""The CPU kernels' shared library: compiled from the C++ files here on first use and kept.

`available()` compiles it with the machine's C++ compiler (a few seconds, kept in the user's cache)
and registers its functions with JAX's foreign function interface. Without a compiler, or with
MIXTRAL_JAX_NATIVE=0 in the environment, the answer is False, and `kernels_for("cpu")` gives the XLA
forms, which compute the same more slowly. Nothing here runs in a process whose model is placed on
an accelerator.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax

from mixtral_jax.paths import cache_folder

_FOLDER = Path(__file__).parent
_FLAGS = (
    "-O3",
    "-funroll-loops",
    "-march=native",
    "-ffp-contract=off",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-Wno-maybe-uninitialized",  # GCC 12's header of AVX-512 has such values on purpose
    "-Wno-psabi",  # vectors are passed between these files only, which are compiled together
)
_FUNCTIONS = (
    *("linear", "grouped", "add_low_rank", "norm", "swiglu", "paged"),
    *("linear_back", "grouped_back", "grouped_weight", "swiglu_back", "after"),
)
_log = logging.getLogger(__name__)


def available() -> bool:
    """Compiles and registers the kernels if need be; False if this process cannot use them."""
    return _library() is not None


def multiplies_bytes() -> bool:
    """Says whether the kernels are there, on a processor whose AVX-512 multiplies bytes (VNNI)."""
    library = _library()
    return library is not None and bool(library.mixtral_jax_multiplies_bytes())


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("MIXTRAL_JAX_NATIVE") == "0":
        return None
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        _log.warning("no C++ compiler was found: CPU steps are several times slower; install g++")
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        _log.warning("the CPU kernels cannot be built, steps are slower: %s", str(detail)[:500])
        return None
    for name in _FUNCTIONS:
        handler = getattr(library, f"mixtral_jax_{name}")
        jax.ffi.register_ffi_target(f"mixtral_jax_{name}", jax.ffi.pycapsule(handler), "cpu")
    return library


def build_command(compiler: str, library: Path) -> list[str]:
    """The command that compiles the C++ files of this folder into a shared library."""
    sources = [str(source) for source in sorted(_FOLDER.glob("*.cc"))]
    return [compiler, *_FLAGS, "-isystem", jax.ffi.include_dir(), *sources, "-o", str(library)]


def _compiled(compiler: str) -> Path:
    """The shared library, compiled unless these files were compiled here before."""
    key = hashlib.sha256()
    for source in sorted([*_FOLDER.glob("*.cc"), *_FOLDER.glob("*.h")]):
        key.update(source.name.encode() + source.read_bytes())
    versions = (jax.ffi.include_dir(), jax.__version__, platform.machine(), _processor())
    for word in (compiler, *_FLAGS, *versions):
        key.update(word.encode())
    library = cache_folder() / "native" / f"{key.hexdigest()[:32]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            unfinished = Path(folder) / "kernels.so"
            command = build_command(compiler, unfinished)
            subprocess.run(command, check=True, capture_output=True, text=True)
            unfinished.rename(library)  # whole at once, whoever else compiles at the same time
    return library


def _processor() -> str:
    """The processor's features, on which -march=native depends: machines may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
