"""`python -m benchmarks.device --model FOLDER`: all that a TPU or GPU has to show, in one table.

Runs under ten minutes on the first device that JAX finds, without network, with the jax that is
installed (0.10 to 0.12), from a clone:

    kernels   every kernel beside XLA's form on the device
    tokens    greedy tokens of the checkpoint, and of it upcycled to 8 experts, beside a CPU's
    rates     copies, products, launches; products of few rows with weights of every dtype: bytes
              a second beside the copies' rate
    engine    1, 8, 32 and 128 rows: tokens a second, a step's time and bytes beside the copy's
              rate and beside the estimate of `plan`

`--model` takes a converted checkpoint of some 135 million parameters, as `make serve` makes it; it
must be brought along. `--random NAME` runs the engine on random weights of a published model's
shapes, once for each `--dtype`: its speed without its files. `--wheels` prints the packages to
bring where the machine has no network: for `pip download` here and `pip install --no-index
--find-links FOLDER` there. On a machine without an accelerator the same command measures the CPU.
It ends with 1 if a kernel or a token differs.
"""

import re
import sys
import time
from collections.abc import Iterator
from importlib.metadata import requires, version
from pathlib import Path
from typing import Annotated

import jax
import typer

from benchmarks.command import run
from benchmarks.device.parity import kernel_parities
from benchmarks.device.products import product_rates
from benchmarks.device.rates import (
    EngineRate,
    copy_rate,
    launch_seconds,
    product_rate,
    rates_of_checkpoint,
    rates_of_random,
)
from benchmarks.device.tokens import agreement, greedy_tokens, tokens_on_cpu
from mixtral_jax.compilation import keep_programs
from mixtral_jax.kernels import Kernels, kernels_for_device
from serving.bench.report import facts


def main(
    model: Annotated[
        Path | None, typer.Option(help="Converted checkpoint; without one, kernels and rates only.")
    ] = None,
    random: Annotated[
        str | None, typer.Option(help="Model for the engine alone, with random weights.")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="Type of the engine's weights, as `serve --dtype`; may be repeated."),
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(help="Requests at a time; by default 1, 8, 32 and 128."),
    ] = None,
    wheels: Annotated[bool, typer.Option("--wheels", help="Print the packages to bring.")] = False,
) -> None:
    """Measure the first device."""
    if wheels:
        print("\n".join(packages()))
        return
    keep_programs()
    begun, device = time.monotonic(), jax.devices()[0]
    is_cpu = device.platform == "cpu"
    machine = ", ".join(f"{name} {value}" for name, value in facts().items())
    print(f"{device.device_kind} ({device.platform}); {machine}\n")
    differs = random is None and _kernels(kernels_for_device(device))
    copied = _rates(is_cpu)
    if random is None:
        _few_rows(kernels_for_device(device), is_cpu, copied)
    levels = rows or [1, 8, 32, 128]
    if model is not None:
        differs |= _tokens(model)
        stored: list[str | None] = [None]
        for wanted in dtype or stored:
            _engine(wanted or "as stored", rates_of_checkpoint(model, wanted, levels), copied)
    if random is not None:
        for name in dtype or ["bfloat16"]:
            _engine(name, rates_of_random(random, name, levels), copied)
    print(f"\n{time.monotonic() - begun:.0f} s in all")
    if differs:
        sys.exit(1)


def packages() -> list[str]:
    """The packages that the kit needs, as pip takes them, with the versions that are here."""
    lines = [line for line in requires("mixtral-jax") or [] if "extra ==" not in line]
    plain = sorted({re.split("[^A-Za-z0-9._-]", line)[0] for line in lines})
    return [f"{name}=={version(name)}" for name in plain]


def _kernels(kernels: Kernels) -> bool:
    """Prints the table of kernels; returns True if one differs."""
    print("| kernel | largest difference / largest value | |\n|---|---|---|")
    differs = False
    for parity in kernel_parities(kernels):
        state = "equal" if parity.holds else f"**differs** {parity.note}"
        print(f"| {parity.name} | {parity.error:.1e} | {state} |", flush=True)
        differs |= not parity.holds
    return differs


def _tokens(model: Path) -> bool:
    """Prints how tokens agree with a CPU's; returns True if some differ."""
    differs = False
    for name, experts in (("as it is", 0), ("upcycled to 8 experts", 8)):
        ours, theirs = greedy_tokens(str(model), experts), tokens_on_cpu(model, experts)
        print(f"\nTokens of the model {name}, beside the CPU's: {agreement(ours, theirs)}")
        differs |= ours != theirs
    return differs


def _rates(is_cpu: bool) -> float:
    """Prints rates; returns that of copies in bytes a second."""
    copied = copy_rate((1 << 28) if is_cpu else (1 << 31))
    print(f"\nCopies {copied / 1e9:,.0f} GB/s; ", end="")
    print(f"products {product_rate(1024 if is_cpu else 8192) / 1e12:,.2f} TFLOP/s; ", end="")
    few, many = launch_seconds(20), launch_seconds(400)
    print(f"a launch of 20 and 400 arguments {few * 1e6:.0f} and {many * 1e6:.0f} us")
    return copied


def _few_rows(kernels: Kernels, is_cpu: bool, copied: float) -> None:
    """Prints how fast products of few rows read their weights."""
    print("\n| product | us | weights, GB/s | share of the copies' rate |\n|---|---|---|---|")
    for product in product_rates(kernels, *((1024, 512) if is_cpu else (14336, 4096))):
        cells = [
            product.name,
            f"{product.seconds * 1e6:,.0f}",
            f"{product.rate / 1e9:,.0f}",
            f"{product.rate / copied:.0%}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def _engine(dtype: str, rates: Iterator[EngineRate], copied: float) -> None:
    print(
        f"\nWeights: {dtype}\n\n| rows | tokens/s | step, ms | weights, GB/s | share of the "
        "copies' rate | plan's estimate, ms | step / estimate |\n|---|---|---|---|---|---|---|"
    )
    for rate in rates:
        cells = [
            f"{rate.rows}",
            f"{rate.tokens_per_second:,.0f}",
            f"{rate.step * 1e3:.2f}",
            f"{rate.weights_per_second / 1e9:,.1f}",
            f"{rate.weights_per_second / copied:.2f}",
            "unknown" if rate.estimate is None else f"{rate.estimate * 1e3:.2f}",
            "" if rate.estimate is None else f"{rate.step / rate.estimate:.2f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run(main, "benchmarks.device")
