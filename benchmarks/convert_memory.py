"""Memory and speed of a conversion: python -m benchmarks.convert_memory [--size-gb 12]

Makes a folder of safetensors as Mixtral-8x7B's (its widths, fewer layers, random bits; with
--layout gptq or awq the layers are integers of four bits), converts it in a process of its own, and
prints

    the peak of that process's resident memory, against 1.5 GiB + twice the largest tensor
    bytes per second, against `cp` of the same files in the same run, in turns

It removes what it made. Times end when a command returns, as a user sees them; `+ sync` is how
long the disk went on. Machines with shared disks differ by 2x from minute to minute: trust ratios,
and medians.
"""

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import ml_dtypes
import numpy as np
import typer
from safetensors.numpy import save_file

from benchmarks.command import run
from convert.export import INDEX_FILE, cut
from convert.name_table import name_table
from convert.source.words import AWQ, GPTQ, Layout
from mixtral_jax.checkpoint.folder import CONFIG_FILE
from mixtral_jax.config import ModelConfig
from mixtral_jax.hf_config import to_hf

GIB = 1 << 30
_SHARD_BYTES = 4_000_000_000
_LAYOUTS = {"gptq": GPTQ, "awq": AWQ}
_CONVERT = "import sys; from pathlib import Path; from convert.convert import convert; "
_CONVERT += "convert(Path(sys.argv[1]), Path(sys.argv[2]), dtype=sys.argv[3])"


@dataclass(frozen=True)
class Run:
    """A timed command."""

    seconds: float
    synced: float  # seconds until the disk has the files
    peak: int  # bytes of resident memory


def mixtral(size: int, layer_bits: int = 16) -> ModelConfig:
    """Returns Mixtral-8x7B with as many layers as take about `size` bytes, at least one.

    A layer's weights have so many bits, the others 16.
    """
    config = replace(ModelConfig.mixtral_8x7b_v01(), num_layers=1)

    def nbytes(layers: int) -> int:
        rows = name_table(replace(config, num_layers=layers), "hf").rows
        in_layers = sum(row.size for row in rows if row.parameter.startswith("layers."))
        return 2 * sum(row.size for row in rows) - in_layers * (16 - layer_bits) // 8

    layer_bytes = nbytes(2) - nbytes(1)
    return replace(config, num_layers=max(1, round((size - nbytes(1)) / layer_bytes) + 1))


def generate(folder: Path, config: ModelConfig) -> tuple[int, int]:
    """Writes a Hugging Face folder of random bits. Returns bytes in all, and of the largest tensor.

    Each tensor is cut at another offset from one random block, because generating random numbers
    for all of them would take most of the run.
    """
    shapes = {row.source: row.shape for row in name_table(config, "hf").rows}
    sizes = {name: 2 * int(np.prod(shape)) for name, shape in shapes.items()}
    shards = cut(shapes, 2, _SHARD_BYTES)
    generator = np.random.default_rng(0)
    block = generator.bytes(64 << 20)
    for shard in shards:
        with (folder / shard.file).open("wb", buffering=0) as file:
            file.write(shard.header("bfloat16"))
            for name in shard.offsets:
                remaining = sizes[name]
                while remaining:
                    start = int(generator.integers(len(block) // 2))
                    remaining -= file.write(block[start : start + min(remaining, len(block) // 2)])
    index = {"weight_map": {name: shard.file for shard in shards for name in shard.offsets}}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    (folder / CONFIG_FILE).write_text(json.dumps(to_hf(config, "bfloat16")))
    return sum(sizes.values()), max(sizes.values())


def generate_integers(folder: Path, config: ModelConfig, layout: Layout) -> tuple[int, int]:
    """Writes layers of four bits in groups of 128, each in a file, and returns as `generate` does.

    The largest tensor is that of words; what is in no layer has a file too.
    """
    block = np.frombuffer(np.random.default_rng(0).bytes(64 << 20), np.int32)
    rows = name_table(config, "hf").rows
    total = largest = 0
    for file, own in itertools.groupby(rows, lambda row: ".".join(row.parameter.split(".")[:2])):
        tensors: dict[str, np.ndarray] = {}
        for row in own:
            name, shape = row.source, row.shape
            is_whole = not file.startswith("layers.") or len(shape) == 1
            if is_whole or row.parameter.endswith("router.weight"):
                tensors[name] = np.ones(shape, ml_dtypes.bfloat16)
                continue
            outputs, inputs = shape
            stem, groups = name.removesuffix("weight"), inputs // 128
            codes = layout.codes_shape(outputs, inputs, 4)
            zeros = layout.zeros_shape(outputs, groups, 4)
            scales = layout.scales_shape(outputs, groups)
            tensors[stem + "qweight"] = np.resize(block, codes)
            tensors[stem + "qzeros"] = np.resize(block, zeros)
            tensors[stem + "scales"] = np.full(scales, 0.01, np.float16)
        total += sum(tensor.nbytes for tensor in tensors.values())
        largest = max(largest, *(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, folder / f"{file}.safetensors")
    fields = {"quant_method": layout.name.lower(), "bits": 4, "group_size": 128}
    content = to_hf(config, "bfloat16") | {"quantization_config": fields}
    (folder / CONFIG_FILE).write_text(json.dumps(content))
    return total, largest


def measure(command: list[str], result: Path) -> Run:
    """Runs a command that makes the folder `result`, and removes the folder."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    peak = 0
    try:
        while process.poll() is None:
            peak = max(peak, _peak(process.pid))
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    seconds = time.perf_counter() - start
    os.sync()
    synced = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{command[0]} failed with {process.returncode}")
    shutil.rmtree(result)
    return Run(seconds, synced, peak)


def _peak(pid: int) -> int:
    """Returns the peak of the resident memory of a process in bytes; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line.split() for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0][1]) * 1024 if lines else 0


def report(copies: list[Run], conversions: list[Run], total: int, largest: int) -> None:
    """Prints the figures of copies and conversions; `total` and `largest` are bytes."""
    bound = 3 * GIB // 2 + 2 * largest
    peak = max(run.peak for run in conversions)
    print(f"\nsource {total / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB")
    print(f"peak memory {peak / GIB:.2f} GiB, bound {bound / GIB:.2f} GiB")
    print(f"{'':10}{'seconds':>10}{'MB/s':>8}{'+ sync':>10}{'MB/s':>8}")
    for name, runs in (("cp", copies), ("convert", conversions)):
        seconds = statistics.median(run.seconds for run in runs)
        synced = statistics.median(run.synced for run in runs)
        rates = total / seconds / 1e6, total / synced / 1e6
        print(f"{name:10}{seconds:10.1f}{rates[0]:8.0f}{synced:10.1f}{rates[1]:8.0f}")
    ratios = [
        statistics.median(a.seconds / b.seconds for a, b in zip(copies, conversions, strict=True)),
        statistics.median(a.synced / b.synced for a, b in zip(copies, conversions, strict=True)),
    ]
    print(f"convert / cp: {ratios[0]:.2f}, with sync {ratios[1]:.2f} (medians of pairs)")


def main(
    size_gb: Annotated[float, typer.Option(help="About the size of the source.")] = 12,
    repeats: Annotated[int, typer.Option(help="Measurements of each command.")] = 3,
    folder: Annotated[
        Path | None, typer.Option(help="Folder to work in; it needs twice the size.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Type of the weights: bfloat16, fp8, or int4 of integers.")
    ] = "bfloat16",
    layout: Annotated[str, typer.Option(help="Layout of the source: floats, gptq or awq.")] = (
        "floats"
    ),
) -> None:
    """Measure the memory and the speed of a conversion."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="convert-memory-") as name:
        source, copy, result = (Path(name) / word for word in ("source", "copy", "result"))
        source.mkdir()
        size = int(size_gb * 1e9)
        if layout == "floats":
            total, largest = generate(source, mixtral(size))
        else:
            total, largest = generate_integers(source, mixtral(size, 4), _LAYOUTS[layout])
        copies, conversions = [], []
        for turn in range(repeats):
            copies.append(measure(["cp", "-r", str(source), str(copy)], copy))
            command = [sys.executable, "-c", _CONVERT, str(source), str(result), dtype]
            conversions.append(measure(command, result))
            load = os.getloadavg()[0]
            print(f"{turn}: {copies[-1]} {conversions[-1]} load {load:.1f}", flush=True)
        report(copies, conversions, total, largest)


if __name__ == "__main__":
    run(main, "benchmarks.convert_memory")
