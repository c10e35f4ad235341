"""Our training step against torch and peft: python -m benchmarks.peers.training [--rounds 5]

The same model, rows and rank: an adapter (LoRA) on all linear weights, by AdamW. Ours has an int8
base and is the step of `mixtral-jax train`; theirs has a base of each of `--dtypes`. Everybody is
measured in turn, `--rounds` times, in a process of its own whose peak memory counts from its start
to its end, compilation included. Prints medians, and the median of the ratios within each round;
above 1 ours is faster, or takes more memory. `processor` compares the time that the cores worked,
which a busy neighbour disturbs less. Everything goes to the JSON file.

    operations       of the compiled products to those of forward pass, slopes and recomputation
    base gradients   products in the compiled step that have the shape of a weight of the base
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.command import run
from serving.bench.report import facts, write_json

_FOLDER = Path(__file__).parent
_OURS = "ours"


def main(
    rounds: Annotated[int, typer.Option(help="How often each is measured.")] = 5,
    steps: Annotated[int, typer.Option(help="Steps of each measurement.")] = 4,
    rows: Annotated[int, typer.Option(help="Rows of a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 256,
    rank: Annotated[int, typer.Option(help="Of the adapter.")] = 16,
    dtypes: Annotated[str, typer.Option(help="Of torch's base; the fastest counts.")] = "bfloat16",
    checkpoint: Annotated[
        Path | None, typer.Option(help="An int8 one of ours; default: random, SmolLM2-135M's shape")
    ] = None,
    hf: Annotated[Path | None, typer.Option(help="The same as a Hugging Face folder.")] = None,
    python: Annotated[
        Path, typer.Option(help="An interpreter with torch, transformers and peft.")
    ] = Path(sys.executable),
    json_file: Annotated[Path, typer.Option("--json", help="Every run.")] = Path("training.json"),
) -> None:
    """Measure our training step and that of torch and peft in turn."""
    if (checkpoint is None) != (hf is None):
        raise typer.BadParameter("give --checkpoint and --hf of the same weights, or neither")
    work = {"rows": rows, "length": length, "rank": rank, "steps": steps}
    mine = {**work, "checkpoint": None if checkpoint is None else str(checkpoint)}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (_OURS, *dtypes.split(","))}
    averages = []
    for number in range(rounds):
        averages.append(os.getloadavg()[0])
        for name, results in runs.items():
            if name == _OURS:
                command = [sys.executable, "-m", "benchmarks.peers.training_steps"]
                result = _measured([*command, json.dumps(mine)])
            else:
                theirs = {**work, "dtype": name, "hf": None if hf is None else str(hf)}
                command = [str(python), str(_FOLDER / "peft_steps.py")]
                result = _measured([*command, json.dumps(theirs)])
            results.append(result)
            print(f"  {number + 1}/{rounds} {_line(name, result, rows * length)}", file=sys.stderr)
    print(f"load average before each round: {', '.join(f'{x:.1f}' for x in averages)}")
    figures = _figures(runs, rows * length)
    print("\n".join(f"{name}: {figure}" for name, figure in figures.items()))
    content = {"facts": facts(), "work": mine, "load_averages": averages, "runs": runs}
    write_json(json_file, {**content, "figures": figures})


def _measured(command: list[str]) -> dict[str, Any]:
    """Runs one process and reads the last line that it prints."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{command[1:3]} ended with status {done.returncode}; see above")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _line(name: str, result: dict[str, Any], tokens: int) -> str:
    step, cpu = (statistics.median(result[key]) for key in ("seconds", "cpu_seconds"))
    peak = result["peak_bytes"] / 1e6
    return f"{name:>9} {tokens / step:6.1f} tokens/s, {cpu:5.2f} s of cores, {peak:5.0f} MB"


def _figures(runs: dict[str, list[dict[str, Any]]], tokens: int) -> dict[str, Any]:
    """The medians, and the ratios to torch's fastest dtype."""

    def medians(name: str, key: str) -> list[float]:
        values = [result[key] for result in runs[name]]
        return [statistics.median(x) if isinstance(x, list) else float(x) for x in values]

    best = min(
        (name for name in runs if name != _OURS),
        key=lambda name: statistics.median(medians(name, "seconds")),
    )

    def ratio(key: str) -> float:
        """The median of theirs over ours."""
        pairs = zip(medians(best, key), medians(_OURS, key), strict=True)
        return statistics.median(theirs / mine for theirs, mine in pairs)

    last = runs[_OURS][-1]
    return {
        **{
            f"tokens/s, {name}": round(tokens / statistics.median(medians(name, "seconds")), 1)
            for name in runs
        },
        "best dtype of torch": best,
        "ratio of tokens/s": round(ratio("seconds"), 2),
        "ratio of tokens/s of processor time": round(ratio("cpu_seconds"), 2),
        "peak MB, ours": round(max(medians(_OURS, "peak_bytes")) / 1e6),
        "peak MB, torch": round(max(medians(best, "peak_bytes")) / 1e6),
        "ratio of peak memory": round(1 / ratio("peak_bytes"), 2),
        "ratio of operations": round(last["operations"] / last["needed_operations"], 2),
        "base gradients": last["base_gradients"],
    }


if __name__ == "__main__":
    run(main, "benchmarks.peers.training")
