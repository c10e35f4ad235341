"""`python -m benchmarks.cpu_kernels`: the CPU kernels beside what this machine can do.

For each form of the kernels that the processor runs (its instruction sets): the bytes that all
cores read a second and the multiplications that they do in registers, then the time of each product
and of attention, and how many times the limit it is, which is the longer of reading the weights or
pages once and of multiplying at the peak. Writes docs/numbers.md between
`<!-- cpu kernels: ... -->` and `<!-- end of cpu kernels -->`.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.command import run, write_between
from benchmarks.cpu_kernels.form import PARTS
from benchmarks.cpu_kernels.limits import limits_of
from benchmarks.cpu_kernels.measurement import Measurement
from mixtral_jax.errors import ConfigError
from mixtral_jax.kernels.cpu import build
from mixtral_jax.kernels.cpu.forms import Form, supported

NUMBERS = Path(__file__).parents[2] / "docs" / "numbers.md"
BEGIN = "<!-- cpu kernels: python -m benchmarks.cpu_kernels -->\n"
END = "<!-- end of cpu kernels -->"
# The flags of /proc/cpuinfo that decide which form runs.
_FLAGS = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("amx_int8", "asimddp", "i8mm"),
)


def machine() -> str:
    """The processor, its cores and those of its instruction sets that the forms ask for."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    named = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    words = set(f"{named.get('flags', '')} {named.get('Features', '')}".split())
    has = " ".join(flag for flag in _FLAGS if flag in words)
    name = named.get("model name", platform.machine()).strip()
    return f"{os.cpu_count()} cores of {name}: {has}"


def measured(form: Form, parts: list[str]) -> Iterator[Measurement]:
    """The measurements of a form, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cpu_kernels.form", *parts]
    environment = {**os.environ, "MIXTRAL_JAX_ISA": form.name, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            yield Measurement(**json.loads(line))
    if child.returncode:
        raise ConfigError(f"the measurements of {form.name} ended with status {child.returncode}")


def cell(measurement: Measurement, limits: Mapping[str, float]) -> str:
    """The time in microseconds and how many times the limit that is; then the share of the peak."""
    reading = measurement.bytes_read / limits["bandwidth"]
    peak = limits.get(measurement.kind)
    multiplying = 0.0 if peak is None else measurement.multiply_adds / peak
    taken = f"{measurement.seconds * 1e6:,.0f}"
    if multiplying > reading:
        return f"{taken} ({multiplying / measurement.seconds:.0%})"
    return f"{taken} ({measurement.seconds / reading:.2f}x)"


def table(form: Form, limits: Mapping[str, float], measurements: list[Measurement]) -> str:
    """One form's table: a line for each work, a column for each size."""
    rates = ", ".join(
        f"{name} {rate / 1e9:,.{1 if name == 'bandwidth' else 0}f} G/s"
        for name, rate in limits.items()
    )
    lines = [f"\n`{form.name}`: {rates}"]
    works = list(dict.fromkeys(measurement.work for measurement in measurements))
    sizes: list[str] = []
    for work in works:
        of_work = {m.size: cell(m, limits) for m in measurements if m.work == work}
        if list(of_work) != sizes:
            sizes = list(of_work)
            head = " | ".join(sizes)
            lines += ["", f"| us at | {head} |", "|---" * (len(sizes) + 1) + "|"]
        lines.append(f"| {work} | {' | '.join(of_work.values())} |")
    return "\n".join(lines)


def main(
    forms: Annotated[str, typer.Option(help="Forms, with commas between; all that run here.")] = "",
    parts: Annotated[str, typer.Option(help="Parts, with commas between.")] = ",".join(PARTS),
    only_print: Annotated[
        bool, typer.Option("--print", help="Leave docs/numbers.md as it is.")
    ] = False,
) -> None:
    """Measure the kernels of every form that runs here beside the machine's limits."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise ConfigError("no C++ compiler was found; install g++")
    runnable = supported(build._features(compiler))
    names = forms.split(",") if forms else [form.name for form in runnable]
    if unknown := set(names) - {form.name for form in runnable}:
        raise ConfigError(f"this machine does not run {', '.join(sorted(unknown))}")
    tables = [f"{machine()}.\n"]
    for form in runnable:
        if form.name not in names:
            continue
        before = limits_of(form, compiler)
        measurements = list(measured(form, parts.split(",")))
        after = limits_of(form, compiler)
        limits = {name: max(rate, after[name]) for name, rate in before.items()}
        tables.append(table(form, limits, measurements))
        print(tables[-1], flush=True)
    if not only_print:
        write_between(NUMBERS, BEGIN, END, "\n" + "\n".join(tables))


if __name__ == "__main__":
    run(main, "benchmarks.cpu_kernels")
