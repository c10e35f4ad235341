"""Memory and speed of a restore: python -m benchmarks.restore_memory [--size-gb 6] [--json FILE]

Makes a checkpoint as Mixtral-8x7B's (its widths, fewer layers, random bits), then lets
--processes processes, a group of `jax.distributed` on this machine, restore it together onto the
virtual devices that they share, for each --mesh and --dtype, and prints for each process

    share     bytes of the parameters that its devices hold; what two of them hold counts once
    before    the peak of its resident memory when jax and the group are up
    peak      the same after the restore
    over      peak - share: promised to be at most 1 GiB
    seconds   of the restore, with the files in the page cache

It removes what it made, and fails if a promise is broken.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.command import run
from benchmarks.convert_memory import mixtral
from mixtral_jax.checkpoint.folder import Card, finished_at
from mixtral_jax.checkpoint.parameters import chunk_shape, parameter_shapes
from mixtral_jax.checkpoint.restore import load
from mixtral_jax.checkpoint.writer import ParameterReader, ParameterWriter
from mixtral_jax.model.transformer import named_parameters
from mixtral_jax.sharding import make_mesh

GIB = 1 << 30
ALLOWED = GIB  # above its share
_LIMIT_S = 900


@dataclass(frozen=True, kw_only=True)
class Report:
    """A process of a restore; figures are bytes."""

    dtype: str
    mesh: str
    process: int
    share: int
    before: int
    peak: int
    seconds: float

    @property
    def over(self) -> int:
        """Bytes of peak memory above the share of the parameters."""
        return self.peak - self.share


def write_checkpoint(
    folder: Path, size: int, width_divisor: int, dtype: str, console: Console
) -> int:
    """Makes a checkpoint of about `size` bytes. Returns how many its parameters have.

    The widths are those of Mixtral-8x7B divided by `width_divisor`.

    Each piece is cut at another offset from one random block, because generating random numbers
    for all of it would take most of the run.
    """
    config = mixtral((size * 2 if dtype == "int8" else size) * width_divisor**2)
    config = replace(
        config,
        hidden_size=config.hidden_size // width_divisor,
        head_size=config.head_size // width_divisor,
        feed_forward_size=config.feed_forward_size // width_divisor,
    )
    shapes = parameter_shapes(config, dtype)
    total = sum(shape.size * shape.dtype.itemsize for shape in shapes.values())
    generator = np.random.default_rng(0)
    block = generator.integers(256, size=64 << 20, dtype=np.uint8)
    done = 0
    with console.status("") as status, finished_at(folder) as partial:
        writer = ParameterWriter(partial, shapes)
        for name, shape in shapes.items():
            status.update(f"writing {dtype}: {done / 1e9:.1f} of {total / 1e9:.1f} GB")
            for index in _pieces(shape.shape, chunk_shape(shape)):
                sizes = tuple(piece.stop - piece.start for piece in index)
                nbytes = int(np.prod(sizes)) * shape.dtype.itemsize
                start = int(generator.integers((len(block) - nbytes) // 64 + 1)) * 64
                values = block[start : start + nbytes].view(shape.dtype).reshape(sizes)
                writer.write(name, index, values)
                done += nbytes
        card = Card(model=config, dtype=dtype, name="synthetic", provider="nobody")
        card.write(partial)
    return total


def _pieces(shape: tuple[int, ...], chunk: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Indices of an array's chunks, in order."""
    cuts = [
        [slice(start, min(start + step, size)) for start in range(0, size, step)]
        for size, step in zip(shape, chunk, strict=True)
    ]
    return list(product(*cuts))


def restore(
    folder: Path, dtype: str, mesh: str, processes: int, verify: bool, console: Console
) -> list[Report]:
    """Runs one restore. Raises SystemExit with what a process said if it fails."""
    devices = int(np.prod(_sizes(mesh)))
    if devices % processes:
        raise SystemExit(f"mesh {mesh} cannot be shared evenly by {processes} processes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        JAX_NUM_CPU_DEVICES=str(devices // processes),
        JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo",
    )
    running = []
    try:
        with console.status(f"restoring {dtype} onto mesh {mesh}"):
            for process_id in range(processes):
                arguments = [folder, dtype, mesh, port, processes, process_id, int(verify)]
                command = [sys.executable, "-m", "benchmarks.restore_memory", "--one"]
                running.append(
                    subprocess.Popen(
                        [*command, " ".join(map(str, arguments))],
                        env=environment,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        text=True,
                    )
                )
            outputs = [process.communicate(timeout=_LIMIT_S) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    for ended, (_, errors) in zip(running, outputs, strict=True):
        if ended.returncode:
            raise SystemExit(f"a process failed with {ended.returncode}:\n{errors}")
    return [Report(**json.loads(out.splitlines()[-1])) for out, _ in outputs]


def _restore_share(arguments: str) -> None:
    """A process that `restore` started."""
    folder, dtype, mesh, port, processes, process, verify = arguments.rsplit(" ", 6)
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    report = restore_part(Path(folder), mesh, dtype, verify == "1")
    # All end together, because a process that ends first is taken for lost by the others.
    jax.distributed.shutdown()
    print(json.dumps(asdict(report)), flush=True)


def restore_part(folder: Path, mesh: str, dtype: str, verify: bool) -> Report:
    """Restores the share of this process, and returns its figures."""
    data, expert, tensor = _sizes(mesh)
    devices = make_mesh(data, expert, tensor)
    before = peak()
    start = time.perf_counter()
    model, _ = load(folder, devices)
    arrays = {name: variable.get_value() for name, variable in named_parameters(model).items()}
    jax.block_until_ready(arrays)
    seconds = time.perf_counter() - start
    report = Report(
        dtype=dtype,
        mesh=mesh,
        process=jax.process_index(),
        share=sum(sum(_held(array).values()) for array in arrays.values()),
        before=before,
        peak=peak(),
        seconds=seconds,
    )
    if verify:
        reader = ParameterReader(folder)
        for name, array in arrays.items():
            for shard in array.addressable_shards:
                held = np.asarray(shard.data)
                stored = np.empty_like(held)
                reader.read(name, shard.index, stored)
                if stored.tobytes() != held.tobytes():
                    raise SystemExit(f"{name} {shard.index} is not what was stored")
    return report


def _held(array: jax.Array) -> dict[str, int]:
    """Bytes of the parts of an array that this process holds."""
    return {str(shard.index): shard.data.nbytes for shard in array.addressable_shards}


def peak() -> int:
    """Returns the peak of the resident memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _sizes(mesh: str) -> list[int]:
    return [int(size) for size in mesh.split(",")]


def show(reports: list[Report], console: Console) -> None:
    """Prints a table of the figures."""
    table = Table(title="GiB, and GB/s of all processes together")
    for column in (
        "dtype",
        "mesh",
        "process",
        "share",
        "before",
        "peak",
        "over",
        "seconds",
        "GB/s",
    ):
        table.add_column(column, justify="right")
    for report in reports:
        group = [r for r in reports if (r.dtype, r.mesh) == (report.dtype, report.mesh)]
        rate = sum(r.share for r in group) / max(r.seconds for r in group) / 1e9
        sizes = (report.share, report.before, report.peak, report.over)
        cells = [f"{size / GIB:.2f}" for size in sizes]
        cells += [f"{report.seconds:.1f}", f"{rate:.2f}"]
        table.add_row(report.dtype, report.mesh, str(report.process), *cells)
    console.print(table)


def main(
    size_gb: Annotated[float, typer.Option(help="About the size of the checkpoint.")] = 6,
    processes: Annotated[int, typer.Option(help="Processes that restore it together.")] = 4,
    mesh: Annotated[list[str], typer.Option(help="Sizes data,expert,tensor; repeatable.")] = [  # noqa: B006
        "1,8,1",
        "2,2,2",
        "1,1,8",
    ],
    dtype: Annotated[list[str], typer.Option(help="Type of the weights.")] = ["bfloat16", "int8"],  # noqa: B006
    narrow: Annotated[int, typer.Option(help="Divisor of the widths, for a small checkpoint.")] = 1,
    folder: Annotated[
        Path | None, typer.Option(help="Folder to work in; it needs the size.")
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Compare the restored arrays with the files.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
    arguments: Annotated[str, typer.Option("--one", hidden=True)] = "",
) -> None:
    """Measure the memory and the speed of a restore by several processes."""
    if arguments:
        return _restore_share(arguments)
    console = Console(stderr=True)
    reports: list[Report] = []
    with tempfile.TemporaryDirectory(dir=folder, prefix="restore-memory-") as work:
        for kind in dtype:
            source = Path(work) / kind
            total = write_checkpoint(source, int(size_gb * 1e9), narrow, kind, console)
            console.print(f"{kind}: {total / 1e9:.2f} GB")
            for shape in mesh:
                reports += restore(source, kind, shape, processes, verify, console)
                show(reports[-processes:], console)
            shutil.rmtree(source)
    if output:
        output.write_text(json.dumps([asdict(report) for report in reports], indent=2) + "\n")
    if broken := [report for report in reports if report.over > ALLOWED]:
        raise SystemExit(f"{len(broken)} of {len(reports)} processes took more than they may")


if __name__ == "__main__":
    run(main, "benchmarks.restore_memory")
