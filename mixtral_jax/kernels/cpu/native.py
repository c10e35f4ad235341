"""Kernels in C++ for CPU, compiled on first use: what XLA:CPU lacks (see native.cc).

`available()` compiles them with the machine's C++ compiler (a few seconds, kept in the user's
cache) and registers them with JAX's foreign function interface. Without a compiler, or with
MIXTRAL_JAX_NATIVE=0 in the environment, the answer is False and callers take their XLA forms, which
compute the same more slowly. Accelerators never come here: callers ask by `on_cpu`.

All kernels take and give float32; weights are float32, or int8 with a float32 scale per output;
pages are float32, or int8 as cache.py says.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.cache import RaggedBatch
from mixtral_jax.compilation import compiled_folder

LANES = 8  # floats that the kernels take at a time
_SOURCE = Path(__file__).with_name("native.cc")
_FLAGS = (
    "-O3",
    "-funroll-loops",
    "-march=native",
    "-ffp-contract=off",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-w",
)
_log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


def on_cpu(native: Callable[[], Answer], xla: Callable[[], Answer]) -> Answer:
    """`native()` where the program is for CPU and the kernels are there, else `xla()`."""
    if not available():
        return xla()
    answer: Answer = jax.lax.platform_dependent(cpu=native, default=xla)
    return answer


@functools.cache
def available() -> bool:
    """Whether the kernels can be used in this process; compiles and registers them if need be."""
    if os.environ.get("MIXTRAL_JAX_NATIVE") == "0":
        return False
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        _log.warning("no C++ compiler was found: CPU steps are several times slower; install g++")
        return False
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        _log.warning("the CPU kernels cannot be built, steps are slower: %s", str(detail)[:500])
        return False
    for name in ("linear", "grouped", "norm", "swiglu", "paged"):
        handler = getattr(library, f"mixtral_jax_{name}")
        jax.ffi.register_ffi_target(f"mixtral_jax_{name}", jax.ffi.pycapsule(handler), "cpu")
    return True


def linear(x: jax.Array, weights: Sequence[tuple[jax.Array, ...]]) -> list[jax.Array]:
    """Products of the same rows with several weights: x [R I] -> one [R O] for each.

    A weight is `(values [O I] f32,)` or `(values [O I] int8, scale [O] f32)`; all are alike.
    """
    rows = x.shape[0]
    shapes = [jax.ShapeDtypeStruct((rows, w[0].shape[0]), jnp.float32) for w in weights]
    arrays = [array for weight in weights for array in weight]
    return list(jax.ffi.ffi_call("mixtral_jax_linear", shapes)(x, *arrays))


def grouped(x: jax.Array, sizes: jax.Array, weight: tuple[jax.Array, ...]) -> jax.Array:
    """Rows in E groups, each against its own weights: x [M I], sizes [E] i32 -> [M O].

    `weight` is `(values [E O I] f32,)` or `(int8, scale [E O] f32)`. Rows behind the last group
    give zeros.
    """
    shape = jax.ShapeDtypeStruct((x.shape[0], weight[0].shape[1]), jnp.float32)
    out: jax.Array = jax.ffi.ffi_call("mixtral_jax_grouped", shape)(x, sizes, *weight)
    return out


def norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * weight for each row of x [R D]."""
    call = jax.ffi.ffi_call("mixtral_jax_norm", jax.ShapeDtypeStruct(x.shape, x.dtype))
    out: jax.Array = call(x, weight, eps=np.float32(eps))
    return out


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up for [R F] each."""
    call = jax.ffi.ffi_call("mixtral_jax_swiglu", jax.ShapeDtypeStruct(up.shape, up.dtype))
    out: jax.Array = call(gate, up)
    return out


def paged(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    batch: RaggedBatch,
    window: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Writes k and v [T K H] into the pages in place, then attends: q [T N H] -> [T N H], pages.

    H is a multiple of LANES. Unused places of the batch give zeros.
    """
    shapes = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct(pages.shape, pages.dtype),
    )
    call = jax.ffi.ffi_call("mixtral_jax_paged", shapes, input_output_aliases={3: 1})
    where = (batch.lengths, batch.query_starts, batch.page_table, batch.num_sequences)
    mixed, pages = call(q, k, v, pages, *where, window=np.int64(window or 0))
    return mixed, pages


def _compiled(compiler: str) -> Path:
    """The shared library, compiled unless this source was compiled here before."""
    include = jax.ffi.include_dir()
    key = hashlib.sha256(_SOURCE.read_bytes())
    for part in (compiler, *_FLAGS, include, jax.__version__, platform.machine(), _processor()):
        key.update(part.encode())
    library = compiled_folder("native") / f"{key.hexdigest()[:32]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as place:
            made = Path(place) / "native.so"
            command = [compiler, *_FLAGS, "-isystem", include, str(_SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            made.rename(library)  # in one piece, whoever else compiles at the same time
    return library


def _processor() -> str:
    """What -march=native depends on: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
