"""The limits of a form on this machine, by a program of C++ that is compiled for it."""

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mixtral_jax.kernels.cpu.forms import Form

_SOURCE = Path(__file__).parent / "limits.cc"


def limits_of(form: Form, compiler: str) -> Mapping[str, float]:
    """Bytes read a second ("bandwidth") and multiplications a second by kind, of all cores."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "limits"
        flags = ["-O2", "-std=c++17", "-pthread", *form.flags, *form.definitions]
        command = [compiler, *flags, str(_SOURCE), "-o", str(program)]
        subprocess.run(command, check=True)
        done = subprocess.run(
            [str(program), str(os.cpu_count())], check=True, capture_output=True, text=True
        )
    return {name: float(rate) for name, rate in map(str.split, done.stdout.splitlines())}
