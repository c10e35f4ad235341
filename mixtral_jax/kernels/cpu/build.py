"""The CPU kernels' shared library: that of the wheel, or compiled from the C++ files here and kept.

A wheel for a common platform has one file with every form (forms.py, prebuilt.py), of which
`available()` registers the one that this machine runs best with JAX's foreign function interface.
Without that file, or where this jax does not take it, the machine's C++ compiler makes that one
form (some seconds, kept in the user's cache). Without a compiler, or with MIXTRAL_JAX_NATIVE=0 in
the environment, the answer is False, and `kernels_for("cpu")` gives the XLA forms, which compute
the same more slowly. Nothing here runs in a process whose model is placed on an accelerator.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from mixtral_jax.kernels.cpu.forms import Form, choose
from mixtral_jax.paths import cache_folder

_FOLDER = Path(__file__).parent
SHIPPED = _FOLDER / "kernels.so"
_FLAGS = (
    "-O3",
    "-funroll-loops",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-Wno-maybe-uninitialized",  # GCC 12's header of AVX-512 has such values on purpose
    "-Wno-psabi",  # vectors are passed between these files only, which are compiled together
)
# The functions of every form, and those that are the same in all.
_OF_A_FORM = (
    *("linear", "grouped", "add_low_rank", "norm", "swiglu", "paged"),
    *("linear_back", "grouped_back", "grouped_weight", "swiglu_back"),
)
_SHARED = ("after",)
_log = logging.getLogger(__name__)


def available() -> bool:
    """Loads and registers the kernels if need be; False if this process cannot use them."""
    return _library() is not None


def form() -> Form | None:
    """The form of the kernels that run in this process; None where XLA computes."""
    library = _library()
    return None if library is None else library[1]


def multiplies_bytes() -> bool:
    """Says whether the kernels are there, in a form that multiplies bytes (VNNI, dotprod)."""
    library = _library()
    return library is not None and bool(_symbol(*library, "multiplies_bytes")())


def description() -> str:
    """The name of the form that runs here, and where it comes from; compiles no kernels for it."""
    if _is_off():
        return "xla (MIXTRAL_JAX_NATIVE=0)"
    try:
        if SHIPPED.exists():
            with contextlib.suppress(OSError):  # then the compiler's run, as in `_library`
                return f"{choose(features_of(ctypes.CDLL(str(SHIPPED))))[0].name} (built in)"
        if compiler := _compiler():
            return f"{choose(_features(compiler))[0].name} (compiled here)"
    except (OSError, subprocess.CalledProcessError):
        return "xla (the kernels cannot be loaded or built)"
    return "xla (no C++ compiler)"


@functools.cache
def _library() -> tuple[ctypes.CDLL, Form] | None:
    return None if _is_off() else _shipped() or _compiled_here()


def _is_off() -> bool:
    return os.environ.get("MIXTRAL_JAX_NATIVE") == "0"


def _shipped() -> tuple[ctypes.CDLL, Form] | None:
    if not SHIPPED.exists():
        return None
    try:
        library = ctypes.CDLL(str(SHIPPED))
        chosen = choose(features_of(library))[0]
        register(library, chosen)
    except (OSError, jax.errors.JaxRuntimeError) as error:
        _log.warning("the CPU kernels of this package are compiled anew: %s", _short(error))
        return None
    return library, chosen


def _compiled_here() -> tuple[ctypes.CDLL, Form] | None:
    compiler = _compiler()
    if compiler is None:
        _log.warning("no C++ compiler was found: CPU steps are several times slower; install g++")
        return None
    try:
        chosen = choose(_features(compiler))[0]
        library = ctypes.CDLL(str(_compiled(build_command(compiler, chosen))))
    except (OSError, subprocess.CalledProcessError) as error:
        _log.warning("the CPU kernels cannot be built, steps are slower: %s", _short(error))
        return None
    register(library, chosen)
    return library, chosen


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def _short(error: Exception) -> str:
    return str(getattr(error, "stderr", None) or error)[:500]


def register(library: ctypes.CDLL, of: Form) -> None:
    """Makes a form's functions the ones that `mixtral_jax_NAME` means to jax.ffi."""
    handlers = {name: _symbol(library, of, name) for name in _OF_A_FORM}
    handlers |= {name: getattr(library, f"mixtral_jax_{name}") for name in _SHARED}
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(f"mixtral_jax_{name}", jax.ffi.pycapsule(handler), "cpu")


def _symbol(library: ctypes.CDLL, of: Form, name: str) -> Any:
    return getattr(library, f"mixtral_jax_{name}_{of.name}")


def _machine(compiler: str) -> ctypes.CDLL:
    """A library of machine.cc alone, which says what the compiler of the kernels must be told."""
    return ctypes.CDLL(str(_compiled([compiler, *_FLAGS, str(_FOLDER / "machine.cc")])))


def _features(compiler: str) -> list[str]:
    return features_of(_machine(compiler))


def features_of(library: ctypes.CDLL) -> list[str]:
    """The words of machine.cc about this machine; `library` is any that holds it."""
    library.mixtral_jax_features.restype = ctypes.c_char_p
    return library.mixtral_jax_features().decode().split()


def build_command(compiler: str, of: Form) -> list[str]:
    """The command that compiles the C++ files of this folder into a shared library of one form.

    The name of the library is to be added, behind "-o".
    """
    sources = [str(source) for source in sorted(_FOLDER.glob("*.cc"))]
    flags = (*_FLAGS, *of.flags, *of.definitions)
    return [compiler, *flags, "-isystem", jax.ffi.include_dir(), *sources]


def digest(words: Iterable[str]) -> str:
    """A name for what is made of the C++ files of this folder, as they are now, and of words."""
    key = hashlib.sha256()
    for source in sorted([*_FOLDER.glob("*.cc"), *_FOLDER.glob("*.h")]):
        key.update(source.name.encode() + source.read_bytes())
    for word in (*words, jax.__version__, platform.machine()):
        key.update(word.encode())
    return key.hexdigest()[:32]


def _compiled(command: Sequence[str]) -> Path:
    """The library that a command makes, compiled unless it was made of the same files before."""
    library = cache_folder() / "native" / f"{digest(command)}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            unfinished = Path(folder) / "kernels.so"
            subprocess.run(
                [*command, "-o", str(unfinished)], check=True, capture_output=True, text=True
            )
            unfinished.rename(library)  # whole at once, whoever else compiles at the same time
    return library
